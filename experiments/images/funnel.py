"""Adaptive retrieval on the pictures of tiny.py: a shortlist at D/32, reranked at D, against one scan at D.

    python experiments/images/funnel.py DATA --scratch SCRATCH [--models mrl] [--seeds 3] [--keep 100]

The training pictures are the database and every picture of val is a query; mAP@10 is over the class labels. The scan at
D is measured twice: faiss' flat index, and our own exact plan, which passes over most of the numbers. All run one query
at a time on one thread, taking turns; medians of the time of a query. One row per model and seed to
results/funnel.jsonl.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
import faiss
import numpy as np
from tiny import WIDTHS, task_of

import matryo as mt
from matryo.encoders.images import read_pictures

RESULTS = Path(__file__).parent / "results" / "funnel.jsonl"
TIMED = 300
"""Queries timed by each plan."""


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def mean_precision(index: mt.Index, plan: str, queries: np.ndarray, wanted: np.ndarray, labels: np.ndarray) -> float:
    """mAP@10 of the answers of a plan, the mean precision at the places of right answers over min(10, right ones)."""
    found = index.search(queries, 10, plan=plan).ids
    right = labels[np.array(found, dtype=np.int64)] == wanted[:, None]
    precisions = right.cumsum(axis=1) / np.arange(1, 11)
    relevant = np.minimum(10, np.bincount(labels, minlength=labels.max() + 1)[wanted])
    return float(((precisions * right).sum(axis=1) / relevant).mean())


def milliseconds(searches: Sequence[Callable[[np.ndarray], object]], queries: np.ndarray) -> list[float]:
    """Median time of one query by each search, taking turns."""
    seconds: list[list[float]] = [[] for _ in searches]
    for query in queries[:TIMED]:
        for found, search in zip(seconds, searches, strict=True):
            began = time.perf_counter()
            search(query)
            found.append(time.perf_counter() - began)
    return [1000 * median(each) for each in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["mrl"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    train = read_pictures(options.data / "train.parquet", 32, cache=options.scratch)
    val = read_pictures(options.data / "val.parquet", 32, classes=train.classes, cache=options.scratch)
    assert task_of(train, val) is not None
    assert train.labels is not None
    assert val.labels is not None
    full = WIDTHS[-1]
    plans = (f"{full}:float32", f"{full // 32}:float32 keep {options.keep} > {full}:float32")
    rows = []
    for model in options.models:
        for seed in range(options.seeds):
            places = [options.scratch / f"{model}-{seed}-{part}.npy" for part in ("train", "val")]
            kept = [np.load(place).astype(np.float32) for place in places]
            with (
                tempfile.TemporaryDirectory() as folder,
                mt.Index.create(Path(folder) / "index", width=full, plan=plans[1], store="float32") as index,
            ):
                index.upsert([str(n) for n in range(len(kept[0]))], kept[0])
                quality = [mean_precision(index, plan, kept[1], val.labels, train.labels) for plan in plans]
                flat = faiss.IndexFlatIP(full)
                flat.add(unit(kept[0]))
                searches: list[Callable[[np.ndarray], object]] = [
                    lambda query, flat=flat: flat.search(query[None], 10),
                    lambda query, index=index: index.search(query, 10, plan=plans[0]),
                    lambda query, index=index: index.search(query, 10, plan=plans[1]),
                ]
                times = milliseconds(searches, unit(kept[1]))
            row = {
                "model": model, "seed": seed, "items": len(kept[0]), "queries": len(kept[1]), "plan": plans[1],
                "mAP@10": quality[1], "mAP@10 of one scan": quality[0], "ms": times[2], "ms of faiss flat": times[0],
                "ms of our exact plan": times[1], "times as fast as faiss flat": times[0] / times[2],
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    options.results.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
