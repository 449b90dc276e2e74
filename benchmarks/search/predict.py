"""How well does `mt.plan` foretell time and memory at five times as many items as it measured?

    python benchmarks/search/predict.py --vectors runs/vectors --items 100000
    python benchmarks/search/predict.py --smoke

Plans on a fifth of the items, builds an index of all of them, and measures every plan of the frontier there, with the
shortlist that was predicted: milliseconds of single `index.search` calls, bytes of codes, and the recall that the
extrapolated shortlist gives. Vectors: a folder that vectors.py writes (vectors.npy, queries.npy), or synthetic ones.
Errors are predicted / measured - 1. Rows go to results/predict.jsonl. One thread.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import matryo as mt
from common import save, synthetic

FACTOR, TURN, ROUNDS = 5, 15, 4


def timed(indexes: dict[str, Any], queries: np.ndarray) -> dict[str, float]:
    """Median milliseconds of each plan, the plans taking turns."""
    times: dict[str, list[float]] = {plan: [] for plan in indexes}
    for turn in range(ROUNDS):
        for plan, index in indexes.items():
            index.search(queries[0], plan=plan)
            for query in queries[turn * TURN : (turn + 1) * TURN]:
                started = time.perf_counter()
                index.search(query, plan=plan)
                times[plan].append((time.perf_counter() - started) * 1e3)
    return {plan: float(np.median(found)) for plan, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help="folder with vectors.npy and queries.npy; synthetic without")
    parser.add_argument("--items", type=int, default=100_000, help="five times what is planned on")
    parser.add_argument("--width", type=int, default=768, help="of synthetic vectors")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--budget", type=float, default=90)
    parser.add_argument("--plans", type=int, default=6, help="plans of the frontier that are built, the best always")
    parser.add_argument("--smoke", action="store_true", help="a size that takes seconds, written nowhere")
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    if args.smoke:
        args.items, args.width, args.budget, args.plans = 10_000, 64, 40, 3
    if args.vectors:
        base = np.load(args.vectors / "vectors.npy", mmap_mode="r")[: args.items]
        queries = np.load(args.vectors / "queries.npy", mmap_mode="r")[:500]
    else:
        base, queries = synthetic(args.items, 500, args.width, 0)
    small = len(base) // FACTOR
    found = mt.plan(base[:small], queries, recall=args.recall, items=len(base), budget=args.budget, say=print)
    print(found.table())
    spread = np.unique(np.linspace(0, len(found.frontier) - 1, args.plans).round().astype(int))
    chosen = {str(row.planned): row for row in (*(found.frontier[n] for n in spread), found.best)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        with mt.Index.create(folder, width=base.shape[1]) as index:
            for start in range(0, len(base), 50_000):
                part = base[start : start + 50_000]
                index.upsert([str(n) for n in range(start, start + len(part))], part)
        opened = {plan: mt.Index.open(folder, read_only=True) for plan in chosen}
        for plan, index in opened.items():
            index.prepare(plan)
        times = timed(opened, queries)
        for plan, row in chosen.items():
            memory = sum(opened[plan].stats()["codes"].values())
            recall = float(opened[plan].recalls(queries)(plan).mean())
            rows.append({
                "plan": plan, "best": row is found.best, "fitted_to": row.last.items, "items": len(base),
                "width": base.shape[1], "vectors": args.vectors.name if args.vectors else "synthetic",
                "predicted_ms": row.predicted.ms, "ms": times[plan], "ms_error": row.predicted.ms / times[plan] - 1,
                "predicted_bytes": row.predicted.code_bytes, "bytes": memory,
                "bytes_error": (row.predicted.code_bytes + 1) / (memory + 1) - 1,
                "target": args.recall, "recall": recall, "own_error": row.error,
            })  # fmt: skip
            print(
                f"{plan:52} ms {row.predicted.ms:7.3f} / {times[plan]:7.3f} ({rows[-1]['ms_error']:+.0%})  memory "
                f"{row.predicted.code_bytes / 1e6:8.2f} / {memory / 1e6:8.2f} MB ({rows[-1]['bytes_error']:+.0%})  "
                f"recall {recall:.4f}"
            )
        for index in opened.values():
            index.close()
    worst = [max(abs(row[name]) for row in rows) for name in ("ms_error", "bytes_error")]
    print(f"worst error: {worst[0]:.0%} of milliseconds, {worst[1]:.0%} of memory")
    if not args.smoke:
        save(Path(__file__).parent / "results" / f"predict-{rows[0]['vectors']}.jsonl", rows)


if __name__ == "__main__":
    main()
