"""What does an index of very many items cost to build, to keep and to ask?

    python benchmarks/search/size.py --items 10000000 --width 256
    python benchmarks/search/size.py --vectors vectors.npy --plan "256:binary keep 500 > 256:float32"
    python benchmarks/search/size.py --smoke

Synthetic vectors unless a .npy is given: 2,000 clusters, the deviation of dimension i falling like i^-flatness, drawn
chunk by chunk from the seed, so that the set is never in memory as a whole; of a file the last rows are the queries.
Built by `Index.extend`, a commit per batch. `peak` is the process's highest resident memory during the build, mapped
pages of the vectors file among it; `anonymous` is what is left without those. Recall is against exact float32 scores of
the vectors as they came, on a sample of queries. Latency is of whole `index.search` calls, one query at a time, one
thread; OMP_NUM_THREADS is how many derive the codes.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import peak_bytes, reset_peak, save
from matryo.core.streams import VectorStream, open_vectors
from matryo.index import Batch, Index

K = 10
CLUSTERS = 2000


def synthetic(items: int, width: int, seed: int, flatness: float) -> VectorStream:
    """Unit rows that look like nested embeddings; chunk n depends on the seed and n alone."""
    scale = (np.arange(1, width + 1) ** -flatness).astype(np.float32)
    centres = np.random.default_rng(seed).standard_normal((CLUSTERS, width), dtype=np.float32)

    def read(size: int, start: int) -> Iterator[np.ndarray]:
        for at in range(start, items, size):
            rng = np.random.default_rng([seed, at])
            count = min(size, items - at)
            part = rng.standard_normal((count, width), dtype=np.float32)
            part += centres[rng.integers(0, CLUSTERS, count)]
            part *= scale
            part /= np.linalg.norm(part, axis=1, keepdims=True)
            yield part

    return VectorStream(Path(f"synthetic, {CLUSTERS} clusters, i^-{flatness}"), items, width, read)


def build(folder: Path, stream: VectorStream, items: int, plan: str, options: argparse.Namespace) -> dict[str, Any]:
    """Stream everything in and close, which derives the codes of the plan and leaves their files."""
    reset_peak()
    started = time.perf_counter()
    drawn = [0.0]

    def batches() -> Iterator[Batch]:
        before, at = time.perf_counter(), 0
        for part in stream.parts(options.batch):
            rows = part[: items - at]
            drawn[0] += time.perf_counter() - before
            if len(rows):
                yield Batch([str(n) for n in range(at, at + len(rows))], rows)
            at, before = at + len(rows), time.perf_counter()

    with Index.create(folder, width=stream.width, plan=plan, store=options.store) as index:
        index.extend(batches(), source="size")
        written = time.perf_counter()
    ended = time.perf_counter()
    return {
        "build s": round(ended - started - drawn[0], 1),
        "of it codes s": round(ended - written, 1),
        "drawing s": round(drawn[0], 1),
        "peak MB": peak_bytes() >> 20,
        "anonymous MB": anonymous_bytes() >> 20,
        **{f"{name} MB": size >> 20 for name, size in sizes(folder).items()},
    }


def anonymous_bytes() -> int:
    """Resident memory that is no file's."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def sizes(folder: Path) -> dict[str, int]:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    kinds = {"vectors": "vectors", "catalogue": "catalogue", "codes": "codes/"}
    return {kind: sum(size for name, size in files.items() if name.startswith(at)) for kind, at in kinds.items()}


def exact(stream: VectorStream, items: int, queries: np.ndarray, batch: int) -> np.ndarray:
    """(Q, k) ids by exact float32 scores, from one more pass over the vectors."""
    heap = faiss.ResultHeap(len(queries), K, keep_max=True)
    at = 0
    for part in stream.parts(batch):
        flat = faiss.IndexFlatIP(stream.width)
        flat.add(np.ascontiguousarray(part[: items - at]))
        scores, rows = flat.search(queries, K)
        heap.add_result(scores, rows + at)
        at += len(part)
        if at >= items:
            break
    heap.finalize()
    return heap.I


def ask(folder: Path, plan: str, queries: np.ndarray, truth: np.ndarray, rounds: int) -> dict[str, Any]:
    started = time.perf_counter()
    with Index.open(folder, read_only=True) as index:
        opened = time.perf_counter()
        index.search(queries[0], K, plan=plan)
        first = time.perf_counter()
        found, took = 0, []
        for turn in range(rounds + 1):  # the first round maps and verifies what the others read
            for query, rows in zip(queries, truth, strict=True):
                begun = time.perf_counter()
                hits = index.search(query, K, plan=plan)
                if turn:
                    took.append((time.perf_counter() - begun) * 1e3)
                else:
                    found += len({str(n) for n in rows} & set(hits.ids[0]))
        codes = sum(index.stats()["codes"].values())
    return {
        "plan": plan,
        "ms": round(float(np.median(took)), 3),
        "p95 ms": round(float(np.quantile(took, 0.95)), 3),
        "recall@10": round(found / truth.size, 4),
        "open s": round(opened - started, 3),
        "first query s": round(first - opened, 3),
        "code MB": codes >> 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vectors", type=Path, help="a .npy instead of synthetic vectors")
    parser.add_argument("--plan", action="append", help="a plan to build for and search with (repeatable)")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=65536, help="rows of a commit")
    parser.add_argument("--store", default="float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flatness", type=float, default=0.35)
    parser.add_argument("--keep", type=Path, help="leave the index and the queries in this new folder")
    parser.add_argument("--smoke", action="store_true", help="a size that takes seconds, written nowhere by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.smoke:
        options.items, options.width, options.queries, options.rounds = 20_000, 64, 10, 1
    faiss.omp_set_num_threads(1)  # of this thread, which asks; codes are derived in another
    asked = options.queries
    if options.vectors:
        stream = open_vectors(options.vectors)
        options.items, options.width = stream.rows - asked, stream.width
        queries = np.concatenate(list(stream.parts(asked, options.items)))
    else:
        stream = synthetic(options.items, options.width, options.seed, options.flatness)
        # Beyond the last item: the same clusters, rows that are not in the index.
        more = synthetic(options.items + asked, options.width, options.seed, options.flatness)
        queries = next(more.read(asked, options.items))
    # Twenty times the items are twenty times the rows between a query and its tenth neighbour: keep grows with them.
    keep, width = max(500, options.items // 2000), options.width
    plans = options.plan or [f"{min(256, width)}:binary keep {keep} > {width}:float32"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)) / "index"
        head = {"items": options.items, "width": options.width, "store": options.store, "vectors": stream.path.name,
                "seed": options.seed, "flatness": options.flatness, "threads": 1,
                "build threads": int(os.environ["OMP_NUM_THREADS"])}  # fmt: skip
        rows = [{**head, "what": "build", "plan": plans[0], **build(folder, stream, options.items, plans[0], options)}]
        print(rows[-1], flush=True)
        truth = exact(stream, options.items, queries, options.batch)
        for plan in plans:
            rows.append({**head, "what": "search", **ask(folder, plan, queries, truth, options.rounds)})
            print(rows[-1], flush=True)
        if options.keep:
            np.save(options.keep / "queries.npy", queries)
    if options.out or not options.smoke:
        name = f"size-{options.items}x{options.width}.jsonl"
        save(options.out or Path(__file__).parent / "results" / name, rows)


if __name__ == "__main__":
    main()
