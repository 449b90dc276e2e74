"""The retrieval experiment of the Matryoshka paper: how little work finds the same answers.

    python benchmarks/search/paper.py --model runs/general --pairs general/train.jsonl.gz --asked general/dev.jsonl.gz

Kusupati et al. 2022 (arXiv 2205.13147), section 4.3 and appendix F: a shortlist of 200 by a short prefix, put in order
by a long one (adaptive retrieval), and a cascade that doubles the width while it halves the shortlist (funnel
retrieval). Corpus: the distinct positives of both files. Queries: anchors of the second file; right are the positives
of its row and of rows of the same group. Accuracy: recall@1, recall@10 and MRR@10 of what is right. Differences to full
width come with an interval from a paired bootstrap over queries.

Cost: millions of multiply-adds a query (the paper's MFLOPs): items x width for an exact scan, graph nodes compared x
width for HNSW, shortlist x width for each later stage. Time: median of whole `index.search` calls, one thread, one
query at a time, all plans taking turns. A plan's last stage is followed by the product's own ordering of the ten
answers by full-width cosine, which is counted. Beside the plans stands `faiss.IndexFlatIP` over the float32 vectors.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo
from common import save
from matryo.core.plan import Plan
from matryo.core.records import rows as table_rows
from matryo.index import Index

K, SHORTLIST, TURN = 10, 200, 10
FLAT = "faiss flat"


def texts(options: Any) -> tuple[list[str], list[str], list[set[int]]]:
    """Documents, queries, and the numbers of the documents that are right for each query."""
    number: dict[str, int] = {}
    for path in (options.pairs, options.asked):
        for _, row in table_rows(path):
            if len(number) < options.items or path is options.asked:
                number.setdefault(row["positive"], len(number))
    groups: dict[str, set[int]] = defaultdict(set)
    asked = [row for _, row in table_rows(options.asked)]
    for row in asked:
        groups[row["group"]].add(number[row["positive"]])
    order = np.random.default_rng(options.seed).permutation(len(asked))[: options.queries]
    chosen = [asked[n] for n in order]
    right = [groups[row["group"]] | {number[row["positive"]]} for row in chosen]
    return list(number), [row["anchor"] for row in chosen], right


def plans(full: int, graph: bool) -> dict[str, str]:
    """Name to plan: the grid of shortlist width x rerank width, the funnel, and full width alone."""
    widths = [full // 64 * 2**n for n in range(7)]
    scan = f" hnsw(M=32,ef={SHORTLIST})" if graph else ""
    made = {f"{full} alone": f"{full}:float32{scan}" + (f" keep {K}" if graph else "")}
    for coarse in widths[:-1]:
        for fine in widths:
            if fine > coarse:
                made[f"{coarse} then {fine}"] = f"{coarse}:float32{scan} keep {SHORTLIST} > {fine}:float32"
    # As the paper has it: each stage reads twice the width of half the candidates, down to the ten answers.
    keeps = [max(K, SHORTLIST >> n) for n in range(len(widths))]
    stages = [
        f"{w}:float32{scan if n == 0 else ''} keep {k}" for n, (w, k) in enumerate(zip(widths, keeps, strict=True))
    ]
    made[f"funnel {widths[0]} .. {full}"] = " > ".join(stages)
    return made


def work(plan: Plan, items: int, full: int, compared: float | None) -> float:
    """Millions of multiply-adds a query."""
    first, *later = plan.stages
    total, shortlist = (compared or items) * first.width, first.keep or K
    for stage in later:
        total += shortlist * stage.width
        shortlist = stage.keep or K
    return (total + (0 if plan.width == full else K * full)) / 1e6


def accuracy(found: list[list[str]], right: list[set[int]]) -> dict[str, np.ndarray]:
    """(Q,) values of each metric."""
    ranks = [
        next((rank for rank, name in enumerate(ids[:K], 1) if int(name) in ok), None)
        for ids, ok in zip(found, right, strict=True)
    ]
    return {
        "recall@1": np.array([rank == 1 for rank in ranks], float),
        "recall@10": np.array([rank is not None for rank in ranks], float),
        "MRR@10": np.array([1 / rank if rank else 0.0 for rank in ranks]),
    }


def interval(difference: np.ndarray, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(1000)]
    return [round(float(x), 4) for x in np.percentile(means, [2.5, 97.5])]


def compared(index: Index, plan: str, queries: np.ndarray) -> float | None:
    """Graph nodes whose distance is taken, a query; None for an exact scan."""
    stats = faiss.cvar.hnsw_stats
    stats.reset()
    for query in queries:
        index.search(query, K, plan=plan)
    return stats.ndis / len(queries) if stats.ndis else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--asked", type=Path, required=True)
    parser.add_argument("--items", type=int, default=10**9, help="documents of --pairs at most")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--graphs", action="store_true", help="HNSW over the prefixes too; builds take minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "paper.jsonl")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)

    documents, asked, right = texts(options)
    model = matryo.load(options.model)
    vectors, queries = model.encode(documents), model.encode(asked)
    known, sought = (np.abs(x).sum(axis=1) > 0 for x in (vectors, queries))
    queries, right = queries[sought], [ok for ok, there in zip(right, sought, strict=True) if there]
    full = vectors.shape[1]
    print(f"{int(known.sum())} documents, {len(queries)} queries, {full} dimensions", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        with Index.create(Path(temporary) / "index", width=full) as index:
            numbers = np.flatnonzero(known)
            for at in range(0, len(numbers), 50000):
                part = numbers[at : at + 50000]
                index.upsert([str(n) for n in part], vectors[part])
        exact = faiss.IndexFlatIP(full)
        exact.add(vectors[known])
        numbers = np.flatnonzero(known)
        with Index.open(Path(temporary) / "index", read_only=True) as index:
            for graph in (False, True) if options.graphs else (False,):
                named = plans(full, graph)
                times: dict[str, list[float]] = defaultdict(list)
                found: dict[str, list[list[str]]] = defaultdict(list)
                nodes = {name: compared(index, plan, queries[:50]) for name, plan in named.items()}
                for start in range(0, len(queries), TURN):
                    for query in queries[start : start + TURN]:
                        began = time.perf_counter()
                        _, rows_1K = exact.search(query[None], K)
                        times[FLAT].append((time.perf_counter() - began) * 1e3)
                        found[FLAT].append([str(n) for n in numbers[rows_1K[0]]])
                    for name, plan in named.items():
                        for query in queries[start : start + TURN]:
                            began = time.perf_counter()
                            hits = index.search(query, K, plan=plan)
                            times[name].append((time.perf_counter() - began) * 1e3)
                            found[name].append(hits.ids[0])
                values = {name: accuracy(ids, right) for name, ids in found.items()}
                for name, plan in {FLAT: f"{full}:float32", **named}.items():
                    row = {
                        "scan": "hnsw" if graph else "exact",
                        "name": name,
                        "plan": plan,
                        "mflops": round(work(Plan.parse(plan), int(known.sum()), full, nodes.get(name)), 3),
                        "ms": round(float(np.median(times[name])), 3),
                    }
                    row |= {metric: round(float(v.mean()), 4) for metric, v in values[name].items()}
                    row["MRR@10 minus flat"] = interval(values[name]["MRR@10"] - values[FLAT]["MRR@10"], options.seed)
                    row["times faster"] = round(float(np.median(times[FLAT]) / np.median(times[name])), 1)
                    print(row, flush=True)
                    rows.append({"items": int(known.sum()), "queries": len(queries), "seed": options.seed, **row})
    save(options.out, rows)


if __name__ == "__main__":
    main()
