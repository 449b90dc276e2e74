"""The retrieval experiment of the Matryoshka paper: how little work finds the same answers.

    python benchmarks/search/paper.py --model runs/general --pairs general/train.jsonl.gz \\
        --asked general/dev.jsonl.gz --work runs/paper --scan exact hnsw

Kusupati et al. 2022 (arXiv 2205.13147), section 4.3 and appendix F: a shortlist of 200 by a short prefix, put in order
by a long one (adaptive retrieval), and a cascade that doubles the width while it halves the shortlist (funnel
retrieval). Corpus: the distinct positives of both files. Queries: anchors of the second file; right are the positives
of its row and of rows of the same group. Accuracy: recall@1, recall@10 and MRR@10 of what is right. Differences to full
width come with an interval from a paired bootstrap over queries.

Cost: millions of multiply-adds a query (the paper's MFLOPs): items x width for an exact scan, graph nodes compared x
width for HNSW, shortlist x width for each later stage. Time: median of whole `index.search` calls, one thread, one
query at a time, all plans taking turns. A plan's last stage is followed by the product's own ordering of the ten
answers by full-width cosine, which is counted. Beside the plans, in the same turns, runs `faiss.IndexFlatIP` over the
float32 vectors.

`--work` keeps vectors, index and graphs, so that a run that was cut off goes on where it was; `--build` stops there,
and a later run with the same `--work` only measures. Rows go to results/paper-SCAN.jsonl.
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
from matryo.core.plan import Plan, Stage
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


def work_of(plan: Plan, items: int, full: int, compared: float | None) -> float:
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


def vectors_of(options: Any, work: Path, documents: list[str], asked: list[str]) -> list[np.ndarray]:
    """(N, D) of the documents and (Q, D) of the queries, encoded once."""
    found = []
    for name, texts_of in (("vectors", documents), ("queries", asked)):
        path = work / f"{name}.npy"
        if not path.exists():
            part = path.with_name(f"part-{path.name}")
            np.save(part, matryo.load(options.model).encode(texts_of))
            part.rename(path)
        found.append(np.load(path, mmap_mode="r"))
        if len(found[-1]) != len(texts_of):
            raise SystemExit(f"{path} holds {len(found[-1])} rows for {len(texts_of)} texts; give another --work")
    return found


def saved_as(stage: Stage, full: int) -> str:
    """Pattern of the file in which an index keeps what this stage scans."""
    name = "float32-hnsw*" if stage.scan == "hnsw" else "bounds.*" if stage.width == full else "float32.*"
    return f"*-{stage.width}-{name}"


def built(folder: Path, vectors: np.ndarray, numbers: np.ndarray, scans: list[str]) -> Path:
    """The index with what the plans scan, each saved as soon as it is there. What is there already is left alone."""
    full = vectors.shape[1]
    if not folder.exists():
        part = folder.with_name(f"part-{folder.name}-{os.getpid()}")
        with Index.create(part, width=full) as index:
            for at in range(0, len(numbers), 50000):
                some = numbers[at : at + 50000]
                index.upsert([str(n) for n in some], vectors[some])
        part.rename(folder)
    for scan in scans:
        for plan in dict.fromkeys(str(Plan(Plan.parse(p).stages[:1])) for p in plans(full, scan == "hnsw").values()):
            if any((folder / "codes").glob(saved_as(Plan.parse(plan).stages[0], full))):
                continue
            began = time.perf_counter()
            # Closed after each, so that it is saved.
            with Index.open(folder) as index:
                index.prepare(plan)
                index.search(vectors[numbers[0]], K, plan=plan)
            print(f"{plan}: there after {time.perf_counter() - began:.0f} s", flush=True)
    return folder


def measured(index: Index, exact: Any, names: np.ndarray, queries: np.ndarray, named: dict[str, str]) -> Any:
    """Milliseconds and answers of every plan and of faiss, which take turns."""
    times: dict[str, list[float]] = defaultdict(list)
    found: dict[str, list[list[str]]] = defaultdict(list)
    for start in range(0, len(queries), TURN):
        some = queries[start : start + TURN]
        for name, plan in {FLAT: "", **named}.items():
            for query in some:
                began = time.perf_counter()
                if name == FLAT:
                    ids = [str(n) for n in names[exact.search(query[None], K)[1][0]]]
                else:
                    ids = index.search(query, K, plan=plan).ids[0]
                times[name].append((time.perf_counter() - began) * 1e3)
                found[name].append(ids)
    return times, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--asked", type=Path, required=True)
    parser.add_argument("--items", type=int, default=10**9, help="documents of --pairs at most")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument(
        "--scan", nargs="+", choices=("exact", "hnsw"), default=["exact"], help="graphs take minutes each"
    )
    parser.add_argument("--work", type=Path, help="folder that keeps vectors, index and graphs")
    parser.add_argument("--build", action="store_true", help="fill --work and measure nothing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)

    documents, asked, right = texts(options)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        vectors, queries = vectors_of(options, work, documents, asked)
        known, sought = (np.abs(x).sum(axis=1) > 0 for x in (vectors, queries))
        queries, right = queries[sought], [ok for ok, there in zip(right, sought, strict=True) if there]
        numbers, full = np.flatnonzero(known), vectors.shape[1]
        print(f"{len(numbers)} documents, {len(queries)} queries, {full} dimensions", flush=True)
        folder = built(work / "index", vectors, numbers, options.scan)
        if options.build:
            return
        exact = faiss.IndexFlatIP(full)
        exact.add(vectors[numbers])
        with Index.open(folder, read_only=True) as index:
            for scan in options.scan:
                rows: list[dict[str, Any]] = []
                named = plans(full, scan == "hnsw")
                nodes = {name: compared(index, plan, queries[:50]) for name, plan in named.items()}
                times, found = measured(index, exact, numbers, queries, named)
                values = {name: accuracy(ids, right) for name, ids in found.items()}
                for name, plan in {FLAT: f"{full}:float32", **named}.items():
                    row = {
                        "scan": scan,
                        "name": name,
                        "plan": plan,
                        "mflops": round(work_of(Plan.parse(plan), len(numbers), full, nodes.get(name)), 3),
                        "ms": round(float(np.median(times[name])), 3),
                    }
                    row |= {metric: round(float(v.mean()), 4) for metric, v in values[name].items()}
                    row["MRR@10 minus flat"] = interval(values[name]["MRR@10"] - values[FLAT]["MRR@10"], options.seed)
                    row["times faster"] = round(float(np.median(times[FLAT]) / np.median(times[name])), 1)
                    print(row, flush=True)
                    rows.append({"items": len(numbers), "queries": len(queries), "seed": options.seed, **row})
                save(Path(__file__).parent / "results" / f"paper-{scan}.jsonl", rows)


if __name__ == "__main__":
    main()
