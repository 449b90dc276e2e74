"""Plans against exact search and against graphs over the full width: time, recall, memory, build.

    python benchmarks/search/run.py speed  --vectors runs/vectors --items 200000 --plan "..." --plan "..."
    python benchmarks/search/run.py rivals --vectors runs/vectors --items 200000 --plan "..."
    python benchmarks/search/run.py growth --vectors runs/vectors --plan "..." --sizes 10000 100000 1000000
    python benchmarks/search/run.py speed --smoke

The vectors are those that vectors.py writes (a nested model over real texts), or synthetic ones without --vectors:
2,000 clusters, deviation of dimension i falling like i^-0.35, 768 dimensions. One thread, one query at a time, the
whole `index.search` call: validation, scan, rerank, the look-up of ten documents. Truth is `faiss.IndexFlatIP` over the
same float32 vectors, and takes turns with the plan every 20 queries, so both share whatever else the machine does.

`speed`: each plan's median time and recall@10, and how many times faster than the exact scan it is.
`rivals`: HNSW of faiss and of usearch over the full width, each at the smallest tried ef that reaches the recall on the
first half of the queries, against the plan, all measured on the second half. Build seconds are processor time.
`growth`: the plan's time by number of items.
"""

import argparse
import json
import os
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
from common import save, synthetic
from matryo.index import Index

K, TURN = 10, 20
PLANS = ["512:binary keep 400 > 768:float32", "768:float32"]
GRAPHS = [("faiss", 16), ("faiss", 32), ("usearch", 16), ("usearch", 32)]
EFS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def load(options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(items, D) and (queries, D) unit rows."""
    if options.vectors is None:
        return synthetic(options.items, options.queries, options.width, options.seed)
    base = np.load(options.vectors / "vectors.npy", mmap_mode="r")[: options.items]
    return np.ascontiguousarray(base), np.load(options.vectors / "queries.npy")[: options.queries]


def build(folder: Path, base: np.ndarray, plan: str, store: str | None) -> float:
    """Upsert everything and derive what the plan needs; seconds of processor time."""
    start = time.process_time()
    more = {"store": store} if store else {}
    with Index.create(folder, width=base.shape[1], plan=plan, **more) as index:
        for at in range(0, len(base), 50000):
            numbers = range(at, min(at + 50000, len(base)))
            index.upsert([f"doc-{n}" for n in numbers], base[at : at + 50000], [f"Title of {n}" for n in numbers])
        index.search(base[0], K)
    return time.process_time() - start


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def turns(
    plan: Callable[[np.ndarray], Any], exact: Callable[[np.ndarray], Any], queries: np.ndarray, rounds: int
) -> Iterator[tuple[int, float, float, Any, Any]]:
    """(query, seconds of the plan, seconds of the exact scan, both answers), taking turns."""
    for query in queries[:50]:
        plan(query)
    for query in queries[:5]:
        exact(query)
    for _ in range(rounds):
        for start in range(0, len(queries), TURN):
            part = queries[start : start + TURN]
            ours = [timed(lambda query=query: plan(query)) for query in part]
            truth = [timed(lambda query=query: exact(query)) for query in part]
            for n, ((a, found), (b, wanted)) in enumerate(zip(ours, truth, strict=True), start):
                yield n, a, b, found, wanted


def summary(name: str, taken: list[tuple[int, float, float, Any, Any]]) -> dict[str, Any]:
    ours, exact = (np.array([row[n] for row in taken]) * 1e3 for n in (1, 2))
    recall = [len({f"doc-{n}" for n in wanted} & set(found)) / K for _, _, _, found, wanted in taken]
    return {
        "plan": name,
        "ms": round(float(np.median(ours)), 4),
        "p95_ms": round(float(np.quantile(ours, 0.95)), 4),
        "exact_ms": round(float(np.median(exact)), 3),
        "ratio": round(float(np.median(exact) / np.median(ours)), 1),
        "recall": round(float(np.mean(recall)), 5),
    }


def memory(index: Index, items: int) -> float:
    """Bytes in memory per item: the codes and graphs in use; full vectors are mapped from the disk."""
    return round(sum(index.stats()["codes"].values()) / items, 1)


def asked(index: Index, plan: str) -> Callable[[np.ndarray], list[str]]:
    """Query to ids, by a plan."""
    return lambda query: index.search(query, K, plan=plan).ids[0]


def named(search: Callable[[np.ndarray, int], Any], ef: int) -> Callable[[np.ndarray], list[str]]:
    """Query to ids, by a graph at one ef."""
    return lambda query: [f"doc-{n}" for n in search(query, ef)]


def flat(base: np.ndarray) -> Callable[[np.ndarray], Any]:
    exact = faiss.IndexFlatIP(base.shape[1])
    exact.add(base)
    return lambda query: exact.search(query[None], K)[1][0]


def speed(options: Any, base: np.ndarray, queries: np.ndarray) -> list[dict[str, Any]]:
    exact, rows = flat(base), []
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        folder = Path(temporary) / "index"
        print(f"build {build(folder, base, options.plan[0], options.store):.1f} s of processor time", flush=True)
        for plan in options.plan:
            with Index.open(folder, read_only=True) as index:
                started = time.process_time()
                index.search(queries[0], K, plan=plan)
                derived = time.process_time() - started
                search = asked(index, plan)
                row = summary(plan, list(turns(search, exact, queries, options.rounds)))
                row |= {"bytes": memory(index, len(base)), "derive_s": round(derived, 1)}
            print(row, flush=True)
            rows.append({"what": "speed", **row})
    return rows


def graph(kind: str, links: int, base: np.ndarray) -> tuple[Callable[[np.ndarray, int], Any], float, float]:
    """(search with ef, build seconds of processor time, bytes per item)."""
    start = time.process_time()
    if kind == "faiss":
        made = faiss.IndexHNSWFlat(base.shape[1], links, faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = 128
        made.add(base)
        size = len(faiss.serialize_index(made)) / len(base)

        def search(query: np.ndarray, ef: int) -> Any:
            made.hnsw.efSearch = ef
            return made.search(query[None], K)[1][0]

        return search, time.process_time() - start, size
    from usearch.index import Index as Graph

    other = Graph(ndim=base.shape[1], metric="ip", dtype="f32", connectivity=links, expansion_add=128)
    other.add(np.arange(len(base)), base, threads=1)

    def look(query: np.ndarray, ef: int) -> Any:
        other.expansion_search = ef
        return other.search(query, K, threads=1).keys

    return look, time.process_time() - start, other.memory_usage / len(base)


def rivals(options: Any, base: np.ndarray, queries: np.ndarray) -> list[dict[str, Any]]:
    exact, half, rows = flat(base), len(queries) // 2, []
    truth = [set(exact(query).tolist()) for query in queries[:half]]
    for kind, links in GRAPHS:
        search, built, size = graph(kind, links, base)
        for ef in EFS:
            found = [len(truth[n] & set(map(int, search(q, ef)))) / K for n, q in enumerate(queries[:half])]
            if np.mean(found) >= options.recall:
                break
        look = named(search, ef)
        row = summary(f"{kind} HNSW M={links} ef={ef}", list(turns(look, exact, queries[half:], options.rounds)))
        row |= {"bytes": round(size, 1), "build_s": round(built, 1)}
        print(row, flush=True)
        rows.append({"what": "rivals", **row})
        del search, look
    for plan in options.plan:
        with tempfile.TemporaryDirectory(dir=options.work) as temporary:
            built = build(Path(temporary) / "index", base, plan, options.store)
            with Index.open(Path(temporary) / "index", read_only=True) as index:
                ours = asked(index, plan)
                row = summary(plan, list(turns(ours, exact, queries[half:], options.rounds)))
                row |= {"bytes": memory(index, len(base)), "build_s": round(built, 1)}
        print(row, flush=True)
        rows.append({"what": "rivals", **row})
    return rows


def growth(options: Any, base: np.ndarray, queries: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for plan in options.plan:
        for size in options.sizes:
            part = base[:size]
            with tempfile.TemporaryDirectory(dir=options.work) as temporary:
                built = build(Path(temporary) / "index", part, plan, options.store)
                with Index.open(Path(temporary) / "index", read_only=True) as index:
                    ours = asked(index, plan)
                    row = summary(plan, list(turns(ours, flat(part), queries, options.rounds)))
                    row |= {"bytes": memory(index, size), "build_s": round(built, 1), "items": size}
            print(row, flush=True)
            rows.append({"what": "growth", **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "rivals", "growth"])
    parser.add_argument("--vectors", type=Path, help="folder that vectors.py wrote; synthetic vectors if not given")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--recall", type=float, default=0.99, help="that rivals must reach")
    parser.add_argument("--plan", action="append", help="repeatable")
    parser.add_argument("--store", choices=["float16", "float32"], help="of the full vectors")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for indexes while they are measured")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.smoke:
        options.items, options.queries, options.sizes = 3000, 40, [500, 3000]
    options.plan = options.plan or PLANS
    options.items = max(options.sizes) if options.what == "growth" else options.items
    faiss.omp_set_num_threads(1)
    base, queries = load(options)
    rows = {"speed": speed, "rivals": rivals, "growth": growth}[options.what](options, base, queries)
    about = {"vectors": "synthetic", "seed": options.seed}
    if options.vectors:
        about = json.loads((options.vectors / "about.json").read_text()) | {"vectors": "real"}
    about |= {"items": len(base), "width": base.shape[1], "asked": len(queries)}
    rows = [{**about, **row} for row in rows]
    if options.out or not options.smoke:
        name = f"{options.what}-{about['vectors']}-{len(base)}.jsonl"
        save(options.out or Path(__file__).parent / "results" / name, rows)


if __name__ == "__main__":
    main()
