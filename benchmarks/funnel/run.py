"""How much quicker is a funnel than an exact scan, one query at a time, and what does it keep?

Builds an index through the public API and times whole `index.search` calls (validation, scan, rerank, the look-up of
ten documents) against `faiss.IndexFlatIP` over the same vectors, on one thread. The two take turns every 20 queries:
often enough to share whatever else the machine does, seldom enough that neither only measures the other's cold caches.

    python benchmarks/funnel/run.py --items 200000 --width 768 --queries 300 --rounds 3
    python benchmarks/funnel/run.py --smoke

On real vectors, those that a model gives the distinct texts of a table, with queries from another table that was held
out (columns anchor, positive or text of both; only anchors or texts are asked):

    python benchmarks/funnel/run.py --model runs/demo/nested --texts train.jsonl.gz --query-texts dev.jsonl.gz
"""

import argparse
import hashlib
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo
from common import synthetic
from matryo.core.records import rows as table_rows
from matryo.index import Index

HERE = Path(__file__).parent
K = 10
TURN = 20


def given(path: Path, items: int, queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a file, shuffled; the last `queries` of them are held out as queries."""
    whole = np.load(path, mmap_mode="r", allow_pickle=False)
    order = np.random.default_rng(seed).permutation(len(whole))[: items + queries]
    rows = np.asarray(whole[np.sort(order)], dtype=np.float32)[np.argsort(np.argsort(order))]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:-queries], rows[-queries:]


def encoded(model: str, texts: Path, asked: Path, items: int, queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows of distinct texts, in seeded order; texts that share a vector with one before are left out."""
    encoder, rng = matryo.load(model).encoder, np.random.default_rng(seed)

    def draw(path: Path, columns: tuple[str, ...], most: int, taken: set[bytes]) -> np.ndarray:
        found = list({row[name]: None for _, row in table_rows(path) for name in columns if row.get(name)})
        kept: list[np.ndarray] = []
        order = rng.permutation(len(found))
        for start in range(0, len(order), 8192):
            if len(kept) >= most:
                break
            part = encoder.vectors([found[n] for n in order[start : start + 8192]], 64, False)
            for row in part[(part != 0).any(axis=1)]:
                key = hashlib.blake2b(row.tobytes(), digest_size=12).digest()
                if key not in taken:
                    taken.add(key)
                    kept.append(row / np.linalg.norm(row))
        print(f"{path.name}: {len(found)} distinct texts, {min(most, len(kept))} of them used")
        return np.stack(kept[:most])

    taken: set[bytes] = set()
    base = draw(texts, ("anchor", "positive", "text"), items, taken)
    return base, draw(asked, ("anchor", "text"), queries, taken)


def plans_for(width: int) -> list[str]:
    """Prefixes and keeps worth a line."""
    wanted = [(128, 500), (256, 100), (256, 200), (256, 400), (512, 200), (512, 400)]
    return [f"{w}:binary keep {n} > {width}:float32" for w, n in wanted if w <= width]


def build(folder: Path, base: np.ndarray, plan: str) -> float:
    """Upsert everything, in one go; seconds."""
    started = time.perf_counter()
    with Index.create(folder, width=base.shape[1], plan=plan) as index:
        for start in range(0, len(base), 50000):
            part = base[start : start + 50000]
            numbers = range(start, start + len(part))
            index.upsert(
                [f"doc-{n}" for n in numbers],
                part,
                [f"Document number {n}, about as long as a title is." for n in numbers],
                [{"shelf": n % 100} for n in numbers],
            )
    return time.perf_counter() - started


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def measure(index: Index, plan: str, exact: Any, queries: np.ndarray, rounds: int) -> Iterator[dict[str, Any]]:
    """One raw row per round and query: both times, and how many of the exact ten came back."""
    for query in queries:
        index.search(query, K, plan=plan)  # maps and verifies what this run will read
    for query in queries[:5]:
        exact.search(query[None], K)
    for turn in range(rounds):
        for start in range(0, len(queries), TURN):
            part = queries[start : start + TURN]
            ours = [timed(lambda query=query: index.search(query, K, plan=plan)) for query in part]
            truth = [timed(lambda query=query: exact.search(query[None], K)[1]) for query in part]
            for number, ((funnel_s, hits), (exact_s, rows)) in enumerate(zip(ours, truth, strict=True), start):
                found = len({f"doc-{n}" for n in rows[0]} & set(hits.ids[0]))
                times = {"funnel_s": funnel_s, "exact_s": exact_s}
                yield {"plan": plan, "round": turn, "query": number, **times, "found": found}


def summary(rows: list[dict[str, Any]], code_bytes: int, float_bytes: int) -> dict[str, Any]:
    """Medians, their ratio, recall and memory of one plan."""
    funnel, exact = (np.array([row[name] for row in rows]) * 1e3 for name in ("funnel_s", "exact_s"))
    return {
        "plan": rows[0]["plan"],
        "funnel_ms": round(float(np.median(funnel)), 4),
        "funnel_p95_ms": round(float(np.quantile(funnel, 0.95)), 4),
        "exact_ms": round(float(np.median(exact)), 3),
        "ratio": round(float(np.median(exact) / np.median(funnel)), 1),
        "recall_at_10": round(sum(row["found"] for row in rows) / (K * len(rows)), 5),
        "code_bytes": code_bytes,
        "float_bytes": float_bytes,
        "float_over_code": round(float_bytes / code_bytes, 1),
    }


def raw_lines(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every measurement, a line per plan and round, query by query: microseconds of both, exact ones found."""
    for turn in sorted({row["round"] for row in rows}):
        mine = sorted((row for row in rows if row["round"] == turn), key=lambda row: row["query"])
        times = {f"{side}_us": [round(row[f"{side}_s"] * 1e6) for row in mine] for side in ("funnel", "exact")}
        yield {"what": "raw", "plan": mine[0]["plan"], "round": turn, **times, "found": [row["found"] for row in mine]}


def processor() -> str:
    """The processor's name, where the system tells."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def source(args: argparse.Namespace) -> str:
    """Where the vectors came from, for the row."""
    if args.model:
        return f"{args.model} of {args.texts.name}, asked with {args.query_texts.name}"
    return args.vectors.name if args.vectors else f"synthetic, 2000 clusters, i^-{args.flatness}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flatness", type=float, default=0.35, help="deviation of dimension i falls like i^-this")
    parser.add_argument("--vectors", type=Path, help="a .npy of real vectors instead of synthetic ones")
    parser.add_argument("--model", help="a model that encodes --texts and --query-texts instead")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--query-texts", type=Path)
    parser.add_argument("--plan", action="append", help="a plan to measure (repeatable); by default six")
    parser.add_argument("--smoke", action="store_true", help="a size that takes seconds, written nowhere by default")
    parser.add_argument("--out", type=Path, help="JSONL of raw rows; by default benchmarks/funnel/results/")
    args = parser.parse_args()
    if args.smoke:
        args.items, args.width, args.queries, args.rounds = 5000, 256, 20, 1
    faiss.omp_set_num_threads(1)
    if len({args.model is None, args.texts is None, args.query_texts is None}) > 1:
        parser.error("--model, --texts and --query-texts belong together")
    if args.model:
        base, queries = encoded(args.model, args.texts, args.query_texts, args.items, args.queries, args.seed)
    elif args.vectors:
        base, queries = given(args.vectors, args.items, args.queries, args.seed)
    else:
        base, queries = synthetic(args.items, args.queries, args.width, args.seed, args.flatness)
    width = base.shape[1]
    exact = faiss.IndexFlatIP(width)
    exact.add(base)
    plans = args.plan or plans_for(width)
    head: dict[str, Any] = {
        "what": "run",
        "items": len(base),
        "width": width,
        "queries": len(queries),
        "rounds": args.rounds,
        "seed": args.seed,
        "vectors": source(args),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": 1,
        "python": platform.python_version(),
        "matryo": matryo.__version__,
        "faiss": faiss.__version__,
        "numpy": np.__version__,
        "sqlite": sqlite3.sqlite_version,
    }
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        head["build_s"] = round(build(Path(temporary) / "index", base, plans[0]), 2)
        print(json.dumps(head))
        print(f"{'plan':42} {'funnel ms':>9} {'p95':>7} {'exact ms':>9} {'ratio':>6} {'recall@10':>9} {'1/memory':>8}")
        for plan in plans:
            with Index.open(Path(temporary) / "index", read_only=True) as index:
                rows = list(measure(index, plan, exact, queries, args.rounds))
                code_bytes = sum(index.stats()["codes"].values())
            total = summary(rows, code_bytes, base.nbytes)
            lines += [{"what": "summary", **total}, *raw_lines(rows)]
            print(
                f"{plan:42} {total['funnel_ms']:9.3f} {total['funnel_p95_ms']:7.3f} {total['exact_ms']:9.2f} "
                f"{total['ratio']:6.1f} {total['recall_at_10']:9.4f} {total['float_over_code']:8.1f}"
            )
    out = args.out or (
        None if args.smoke else HERE / "results" / f"{len(base)}x{width}{'-texts' if args.model else ''}.jsonl"
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))


if __name__ == "__main__":
    main()
