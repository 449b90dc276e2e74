"""How close to the memory's speed does each first stage run?

    python benchmarks/search/bandwidth.py --index runs/size/index --queries runs/size/queries.npy
    python benchmarks/search/bandwidth.py --vectors runs/vectors --items 1000000
    python benchmarks/search/bandwidth.py --vectors runs/vectors --work runs/bandwidth --build-only
    python benchmarks/search/bandwidth.py --smoke

With --work the index and the files of all codes are kept there: --build-only derives them, and what is timed is short.

Read bandwidth of one thread is measured in the same run: the best of summing a gigabyte of 64-bit integers and of an
inner product of float32 vectors of that size. Each stage's own time comes from `explain`; its bytes are those that
`stats` reports for its codes, less the row numbers beside packed ones. The median over single queries, turn by turn
with the bandwidth itself.
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
from run import build, load

from common import save
from matryo.core.errors import MatryoError
from matryo.core.plan import Plan
from matryo.index import Index
from matryo.index.codes import held_as

STAGES = [
    "64:binary", "128:binary", "256:binary", "512:binary", "16:float32", "32:float32", "64:float32", "64:float16",
    "64:bfloat16", "32:int8", "64:int8", "128:int8", "64:int4", "128:int4", "128:pq32", "128:pq64", "256:pq64",
    "128:rabitq", "256:rabitq",
]  # fmt: skip


def read_bandwidth(size: int) -> float:
    """Gigabytes a second of one thread reading."""
    numbers = np.ones(size // 8, np.int64)
    floats = numbers.view(np.float32)
    best = 0.0
    for _ in range(3):
        for read in (numbers.sum, lambda: np.dot(floats, floats)):
            start = time.perf_counter()
            read()
            best = max(best, numbers.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def derive(folder: Path, stages: list[str]) -> None:
    """Leave files of all these codes."""
    for stage in stages:
        with Index.open(folder) as index:
            try:
                index.prepare(f"{stage} keep 200 > {index.stats()['width']}:float32")
            except MatryoError as error:
                print(f"{stage}: {error}", flush=True)


def measure(folder: Path, stages: list[str], queries: np.ndarray, size: int) -> list[dict[str, Any]]:
    rows = []
    for stage in stages:
        # Opened for each, so that only one code is in memory.
        with Index.open(folder, read_only=True) as index:
            items, plan = len(index), f"{stage} keep 200 > {index.stats()['width']}:float32"
            try:
                index.prepare(plan)  # a first search does not wait for what is packed
                for query in queries[:5]:
                    index.search(query, plan=plan)
            except MatryoError as error:
                print(f"{stage}: {error}", flush=True)
                continue
            took = [index.search(query, plan=plan, explain=True).explanation[0].milliseconds for query in queries]
            codes = index.stats()["codes"]
        first = Plan.parse(plan).stages[0]
        name = held_as(first, first=True)
        # Packed codes have row numbers beside them, which a scan reads only of what it keeps.
        held = codes[f"{first.width}:{name}"] / items - (8 if " " in name else 0)
        bandwidth = read_bandwidth(size)
        speed = float(held * items / np.median(took) / 1e6)
        rows.append({"stage": stage, "items": items, "ms": round(float(np.median(took)), 3), "bytes": round(held, 1),
                     "GB/s": round(speed, 2), "machine GB/s": round(bandwidth, 2),
                     "share": round(speed / bandwidth, 3)})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, help="an index that is there")
    parser.add_argument("--queries", type=Path, help=".npy of queries for it")
    parser.add_argument("--vectors", type=Path, help="folder that vectors.py wrote; synthetic vectors if not given")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--asked", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", nargs="+", default=STAGES)
    parser.add_argument("--work", type=Path, help="folder for the index, kept and used again")
    parser.add_argument("--build-only", action="store_true", help="only derive the codes; measure another time")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = 1 << 30
    if options.smoke:
        options.items, options.asked, size = 20000, 5, 1 << 24
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.index
        if folder is None:
            given = argparse.Namespace(**{**vars(options), "queries": options.asked})
            base, queries = load(given)
            folder = (options.work or Path(temporary)) / f"index-{len(base)}"
            if not folder.exists():
                build(folder, base, f"{base.shape[1]}:float32", None)
            del base
        else:
            queries = np.load(options.queries)[: options.asked]
        if options.build_only:
            derive(folder, options.stage)
        rows = [] if options.build_only else measure(folder, options.stage, queries, size)
    if rows and (options.out or not options.smoke):
        save(options.out or Path(__file__).parent / "results" / f"bandwidth-{rows[0]['items']}.jsonl", rows)


if __name__ == "__main__":
    main()
