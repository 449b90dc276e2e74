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
`filters`: recall and time with a filter that leaves 1, 10 and 50 % of the items, against an exact scan of those alone;
`first_ms` is the first search by a filter, which looks the items up, later ones by the same filter know them.
With --work what is built is kept, so that it can be built (--build-only) and measured at different times.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from re import sub
from shutil import rmtree
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
GRAPHS = ["faiss:16", "faiss:32", "usearch:16", "usearch:32"]
EFS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def load(options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(items, D) and (queries, D) unit rows."""
    if options.vectors is None:
        return synthetic(options.items, options.queries, options.width, options.seed)
    base = np.load(options.vectors / "vectors.npy", mmap_mode="r")[: options.items]
    return np.ascontiguousarray(base), np.load(options.vectors / "queries.npy")[: options.queries]


def build(folder: Path, base: np.ndarray, plan: str, store: str | None, field: np.ndarray | None = None) -> float:
    """Upsert everything, with a field of metadata if it is given, and derive what the plan needs; processor seconds."""
    start = time.process_time()
    more = {"store": store} if store else {}
    with Index.create(folder, width=base.shape[1], plan=plan, **more) as index:
        for at in range(0, len(base), 50000):
            numbers = range(at, min(at + 50000, len(base)))
            metadata = None if field is None else [{"field": int(field[n])} for n in numbers]
            titles = [f"Title of {n}" for n in numbers]
            index.upsert([f"doc-{n}" for n in numbers], base[at : at + 50000], titles, metadata)
        index.prepare()
    return time.process_time() - start


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def turns(
    plan: Callable[[np.ndarray], Any], exact: Callable[[np.ndarray], Any], queries: np.ndarray, rounds: int
) -> Iterator[tuple[int, float, float, Any, Any]]:
    """(query, seconds of the plan, seconds of the exact scan, both answers), taking turns."""
    for query in queries:  # one round that maps and verifies what the others read
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


def asked(index: Index, plan: str, where: dict[str, Any] | None = None) -> Callable[[np.ndarray], list[str]]:
    """Query to ids, by a plan, with or without a filter."""
    return lambda query: index.search(query, K, plan=plan, where=where).ids[0]


def named(search: Callable[[np.ndarray, int], Any], ef: int) -> Callable[[np.ndarray], list[str]]:
    """Query to ids, by a graph at one ef."""
    return lambda query: [f"doc-{n}" for n in search(query, ef)]


def flat(base: np.ndarray) -> Callable[[np.ndarray], Any]:
    exact = faiss.IndexFlatIP(base.shape[1])
    exact.add(base)
    return lambda query: exact.search(query[None], K)[1][0]


def speed(options: Any, base: np.ndarray, queries: np.ndarray) -> list[dict[str, Any]]:
    exact, rows = flat(base), []
    with work(options) as folder:
        place, built = index_of(options, base, options.plan[0], folder)
        print(f"build {built:.1f} s of processor time", flush=True)
        if options.build_only:
            return rows
        for plan in options.plan:
            with Index.open(place, read_only=True) as index:
                started = time.process_time()
                index.prepare(plan)
                derived = time.process_time() - started
                search = asked(index, plan)
                row = summary(plan, list(turns(search, exact, queries, options.rounds)))
                row |= {"bytes": memory(index, len(base)), "derive_s": round(derived, 1)}
            print(row, flush=True)
            rows.append({"what": "speed", **row})
    return rows


Search = Callable[[np.ndarray, int], Any]


def faiss_graph(links: int, base: np.ndarray, file: Path, kind: str) -> tuple[Search, Callable[[], int]]:
    """A full-width HNSW of faiss over float32 or int8 rows: (search with ef, bytes)."""
    if not file.exists():
        if kind == "faiss":
            made = faiss.IndexHNSWFlat(base.shape[1], links, faiss.METRIC_INNER_PRODUCT)
        else:
            made = faiss.IndexHNSWSQ(base.shape[1], faiss.ScalarQuantizer.QT_8bit, links, faiss.METRIC_INNER_PRODUCT)
            made.train(base[:: max(1, len(base) // 65536)])
        made.hnsw.efConstruction = 128
        made.add(base)
        faiss.write_index(made, str(file))
    else:
        made = faiss.read_index(str(file))

    def search(query: np.ndarray, ef: int) -> Any:
        made.hnsw.efSearch = ef
        return made.search(query[None], K)[1][0]

    return search, lambda: file.stat().st_size


def usearch_graph(links: int, base: np.ndarray, file: Path) -> tuple[Search, Callable[[], int]]:
    """A full-width HNSW of usearch over float32 rows: (search with ef, bytes)."""
    from usearch.index import Index as Graph

    made = Graph(ndim=base.shape[1], metric="ip", dtype="f32", connectivity=links, expansion_add=128)
    if not file.exists():
        made.add(np.arange(len(base)), base, threads=1)
        made.save(str(file))
    else:
        made.load(str(file))

    def search(query: np.ndarray, ef: int) -> Any:
        made.expansion_search = ef
        return made.search(query, K, threads=1).keys

    return search, lambda: file.stat().st_size


def graph(kind: str, links: int, base: np.ndarray, folder: Path) -> tuple[Search, float, float]:
    """(search with ef, build seconds of processor time, bytes per item); from the folder where it was built before."""
    file, noted = folder / f"{kind}-{links}-{len(base)}", folder / f"{kind}-{links}-{len(base)}.json"
    start = time.process_time()
    made = usearch_graph(links, base, file) if kind == "usearch" else faiss_graph(links, base, file, kind)
    if not noted.exists():
        noted.write_text(json.dumps({"build_s": time.process_time() - start}))
    return made[0], json.loads(noted.read_text())["build_s"], made[1]() / len(base)


def index_of(
    options: Any, base: np.ndarray, plan: str, folder: Path, field: np.ndarray | None = None
) -> tuple[Path, float]:
    """(folder of an index with this plan, its build seconds of processor time); one that is there is used again."""
    place = folder / f"{'index' if field is None else 'fields'}-{len(base)}-{sub('[^a-zA-Z0-9]+', '-', plan)}"
    noted = place.with_suffix(".json")
    if not noted.exists():
        rmtree(place, ignore_errors=True)
        noted.write_text(json.dumps({"build_s": build(place, base, plan, options.store, field)}))
    return place, json.loads(noted.read_text())["build_s"]


@contextmanager
def work(options: Any) -> Iterator[Path]:
    """The folder for what is built: the one that was named, which is kept, or a temporary one."""
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        yield options.work
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def rivals(options: Any, base: np.ndarray, queries: np.ndarray) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with work(options) as folder:
        if options.build_only:
            for kind, links in options.graphs:
                print(kind, links, f"{graph(kind, links, base, folder)[1]:.0f} s", flush=True)
            for plan in options.plan:
                print(plan, f"{index_of(options, base, plan, folder)[1]:.0f} s", flush=True)
            return rows
        exact, half = flat(base), len(queries) // 2
        truth = [set(exact(query).tolist()) for query in queries[:half]]
        for kind, links in options.graphs:
            search, built, size = graph(kind, links, base, folder)
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
            place, built = index_of(options, base, plan, folder)
            with Index.open(place, read_only=True) as index:
                ours = asked(index, plan)
                row = summary(plan, list(turns(ours, exact, queries[half:], options.rounds)))
                row |= {"bytes": memory(index, len(base)), "build_s": round(built, 1)}
            print(row, flush=True)
            rows.append({"what": "rivals", **row})
    return rows


def growth(options: Any, base: np.ndarray, queries: np.ndarray) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with work(options) as folder:
        for plan in options.plan:
            for size in options.sizes:
                part = base[:size]
                place, built = index_of(options, part, plan, folder)
                print(f"{size}: {plan}: built in {built:.0f} s", flush=True)
                if options.build_only:
                    continue
                with Index.open(place, read_only=True) as index:
                    row = summary(plan, list(turns(asked(index, plan), flat(part), queries, options.rounds)))
                    row |= {"bytes": memory(index, size), "build_s": round(built, 1), "items": size}
                print(row, flush=True)
                rows.append({"what": "growth", **row})
    return rows


def filters(options: Any, base: np.ndarray, queries: np.ndarray) -> list[dict[str, Any]]:
    """Recall and time among the items that a filter leaves, against an exact scan of those items alone."""
    rows: list[dict[str, Any]] = []
    field = np.arange(len(base)) % 100
    with work(options) as folder:
        place, _ = index_of(options, base, options.plan[0], folder, field)
        if options.build_only:
            return rows
        for plan in options.plan:
            with Index.open(place, read_only=True) as index:
                index.prepare(plan)
                for percent in options.percents:
                    kept = np.flatnonzero(field < percent)
                    where = {"field": {"<": percent}}
                    fresh, _ = timed(lambda where=where, plan=plan: index.search(queries[0], K, plan=plan, where=where))
                    search, exact = asked(index, plan, where), flat(np.ascontiguousarray(base[kept]))
                    taken = turns(search, lambda q, exact=exact, kept=kept: kept[exact(q)], queries, options.rounds)
                    row = summary(plan, list(taken))
                    row |= {"matching": round(len(kept) / len(base), 4), "first_ms": round(fresh * 1e3, 1)}
                    print(row, flush=True)
                    rows.append({"what": "filters", **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "rivals", "growth", "filters"])
    parser.add_argument("--vectors", type=Path, help="folder that vectors.py wrote; synthetic vectors if not given")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--recall", type=float, default=0.99, help="that rivals must reach")
    parser.add_argument("--plan", action="append", help="repeatable")
    parser.add_argument("--store", choices=["float16", "float32"], help="of the full vectors")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--percents", type=int, nargs="+", default=[1, 10, 50], help="of the items that filters leave")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", nargs="*", default=GRAPHS, help="rivals: faiss:M, faiss-int8:M, usearch:M")
    parser.add_argument("--work", type=Path, help="folder for what is built, kept and used again")
    parser.add_argument("--build-only", action="store_true", help="only fill --work; measure another time")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.smoke:
        options.items, options.queries, options.sizes = 3000, 40, [500, 3000]
    options.plan = options.plan or PLANS
    options.graphs = [(kind, int(links)) for kind, _, links in (text.partition(":") for text in options.graphs)]
    options.items = max(options.sizes) if options.what == "growth" else options.items
    faiss.omp_set_num_threads(1)
    base, queries = load(options)
    rows = {"speed": speed, "rivals": rivals, "growth": growth, "filters": filters}[options.what](
        options, base, queries
    )
    about = {"vectors": "synthetic", "seed": options.seed}
    if options.vectors:
        about = json.loads((options.vectors / "about.json").read_text()) | {"vectors": "real"}
    about |= {"items": len(base), "width": base.shape[1], "asked": len(queries)}
    rows = [{**about, **row} for row in rows]
    if rows and (options.out or not options.smoke):
        name = f"{options.what}-{about['vectors']}-{len(base)}.jsonl"
        save(options.out or Path(__file__).parent / "results" / name, rows)


if __name__ == "__main__":
    main()
