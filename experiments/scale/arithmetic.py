"""A billion vectors of 1,024 dimensions: memory, disk, machines, money and milliseconds, from what was measured.

    python experiments/scale/arithmetic.py [--items 1e9] [--width 1024] [--ram-price 3] [--disk-price 0.1] ...

Nothing of this size was run. Every figure is a measured one per item (read here from the rows under `benchmarks/`), or
follows from a format, times the number of items; milliseconds are carried by the planner's own scaling model
(`matryo.planner.scaling`). Prints the tables that docs/scale.md quotes, each line with what it rests on.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryo.planner.scaling import GRAPH_POWER, Measured, predict

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GB, MIB = 1e9, 1 << 20
PAGE, PAGE_HEAD, LINE_POINTER, TUPLE_HEAD = 8192, 24, 4, 24
"""PostgreSQL's page layout (its manual, "Database Page Layout")."""
SLOWER, QUICKER = 1.37, 1.22
"""The worst misses of predictions held against measurements, five times up (`benchmarks/search/predict.py`)."""


@dataclass(frozen=True)
class Plan:
    """One way to hold and ask all items. Bytes are per item, milliseconds of one query on one thread."""

    name: str
    memory: float
    """Bytes that every query may touch: codes and graphs. They must be in memory."""
    disk: float
    keep: int
    """Full vectors read per query."""
    low_ms: float
    high_ms: float
    """With everything in memory."""
    build_days: float | None
    """Processor days, vectors given."""
    rests_on: str
    one_machine: bool = False
    """Whether it cannot be spread, so that one machine has to be large enough."""


def rows(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """Measured rows of a file under benchmarks/ in which these fields have these values."""
    lines = (BENCHMARKS / name).read_text().splitlines()
    found = [row for row in map(json.loads, lines) if all(row.get(key) == value for key, value in wanted.items())]
    if not found:
        raise SystemExit(f"benchmarks/{name} has no row with {wanted}")
    return found


def measured(items: int, ms: float, scan_ms: float | None = None, keep: int = 1, build_s: float = 0.0) -> Measured:
    """A row as the scaling model takes it; without `scan_ms` the whole call is counted as scan."""
    scan = ms if scan_ms is None else scan_ms
    return Measured(items, keep, keep, ms, ms, ms, scan, ms - scan, 1, 1, build_s)


def power(grown: list[dict[str, Any]]) -> float:
    """The power of the number of items by which our own graph's milliseconds grew."""
    first, last = grown[0], grown[-1]
    return math.log(last["ms"] / first["ms"]) / math.log(last["items"] / first["items"])


def embedded(items: int, width: int) -> Iterable[Plan]:
    """One folder on one machine (`FolderIndex`)."""
    built = rows("search/results/size-10000000x256.jsonl", what="build")[0]
    catalogue = built["catalogue MB"] * MIB / built["items"]
    store = 2 * width + catalogue
    grown = rows("search/results/growth-real-1000000.jsonl", what="growth")
    graph = [measured(row["items"], row["ms"], build_s=row["build_s"]) for row in grown]
    best = rows("search/results/speed-real-1000000.jsonl", plan="192:int8 hnsw(M=16,ef=450) keep 150 > 768:float32")[0]
    fitted = predict(graph, items, graph=True)
    growth = fitted.ms / grown[-1]["ms"]
    steepest = (items / best["items"]) ** GRAPH_POWER
    part = 192 / 768
    bytes_per_item = best["bytes"] + (part * width - 192)
    yield Plan(
        f"{round(part * width)}:int8 hnsw(M=16) keep 150 > {width}:float32",
        bytes_per_item,
        store + bytes_per_item,
        150,
        best["ms"] * growth,
        best["ms"] * steepest,
        fitted.build_s / 86_400,
        "search/growth-real-1000000, speed-real-1000000 (768 dimensions, real)",
        one_machine=True,
    )
    pairs = [rows(f"search/results/size-{n}x256.jsonl", what="search")[0] for n in (1_000_000, 10_000_000)]
    keeps = [500, 5000]
    scan = rows("search/results/bandwidth-10000000.jsonl", stage="256:binary")[0]["ms"]
    sizes = [
        measured(row["items"], row["ms"], scan * row["items"] / 1e7, keep)
        for row, keep in zip(pairs, keeps, strict=True)
    ]
    flat = predict(sizes, items, graph=False)
    days = built["of it codes s"] / built["items"] * items / 86_400
    yield Plan(
        f"256:binary keep {flat.keep:,} > {width}:float32",
        32.0,
        store + 32,
        flat.keep,
        flat.ms / QUICKER,
        SLOWER * (flat.ms + (flat.ms - scan * items / 1e7) * (width / 256 - 1)),
        days,
        "search/size-1000000x256, size-10000000x256, bandwidth-10000000 (256 dimensions, synthetic)",
        one_machine=True,
    )
    full = rows("search/results/rivals-real-200000.jsonl", plan="faiss HNSW M=32 ef=256")[0]
    links = full["bytes"] - 4 * 768
    yield Plan(
        f"for comparison: graph over all {width} float32, M=32",
        4 * width + links,
        4 * width + links,
        0,
        full["ms"] * (items / 200_000) ** power(grown),
        full["ms"] * (items / 200_000) ** GRAPH_POWER,
        None,
        "search/rivals-real-200000 (768 dimensions, real)",
        one_machine=True,
    )


def heap_bytes(width: int) -> float:
    """A row of PostgreSQL with an id and a halfvec that stays in its page: whole rows a page."""
    row = LINE_POINTER + TUPLE_HEAD + 16 + 8 + 2 * width
    return PAGE / ((PAGE - PAGE_HEAD) // row)


def postgres(items: int, width: int, shard: int) -> Plan:
    """PostgreSQL with pgvector: every shard asked at once, the slowest answers last."""
    row = next(r for r in rows("engines/results/postgres-200000-m32.jsonl", what="search") if r["side"] == "funnel")
    per_item = row["index_bytes"] / 200_000 + 2 * (width / 4 - 192)
    up, grown = shard / 200_000, rows("search/results/growth-real-1000000.jsonl", what="growth")
    return Plan(
        f"{width // 4}:float16 hnsw(M=32,ef=500) keep 400 > {width}:float32, {math.ceil(items / shard)} shards",
        per_item,
        per_item + heap_bytes(width),
        400,
        row["ms"] * up ** power(grown),
        row["ms"] * up**GRAPH_POWER,
        row["build_s"] / (200_000 * math.log(200_000)) * items * math.log(shard) / 86_400,
        "engines/postgres-200000-m32 (768 dimensions, real); heap from the page layout",
    )


def structure(name: str, width: int) -> Plan:
    """An engine of whose bytes nothing is measured here: a graph's links and codes are the same wherever they lie."""
    graph = rows("search/results/growth-real-1000000.jsonl", what="growth")[-1]
    memory = graph["bytes"] - 192 + width / 4
    return Plan(
        f"{name}: {width // 4} dimensions as int8 in a graph, M=16, {width} float16 on the disk",
        memory,
        memory + 2 * width,
        150,
        math.nan,
        math.nan,
        None,
        "our own graph's links and codes; of this engine nothing was measured",
    )


def loading(items: int, width: int) -> Iterable[tuple[str, ...]]:
    """Hours to hand over ready vectors; bytes decide, so other widths are taken in proportion."""
    built = rows("search/results/size-10000000x256.jsonl", what="build")[0]
    writing = built["build s"] - built["drawing s"] - built["of it codes s"]
    hours = writing / built["items"] * items * width / built["width"] / 3600
    yield "an embedded folder, codes and graphs aside", f"{hours:,.1f}", "search/size-10000000x256"
    row = rows("engines/results/postgres-200000-m32.jsonl", what="ingestion")[0]
    hours = row["extend_s"] / row["rows"] * items * width / 768 / 3600
    yield "PostgreSQL, its graph aside; shards take it side by side", f"{hours:,.1f}", "engines/postgres-200000-m32"
    bulk = BENCHMARKS / "bulk/results/rows.jsonl"
    for row in map(json.loads, bulk.read_text().splitlines() if bulk.is_file() else []):
        if row["what"] == "median" and row["workers"]:
            hours = items / row["rows_per_second"] / 3600
            what = f"encoding short texts first, static model, {row['workers']} workers of one thread"
            yield what, f"{hours:,.1f}", "bulk/rows"


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=float, default=1e9)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--shard", type=float, default=5e7, help="rows of a PostgreSQL shard")
    parser.add_argument("--node-gb", type=float, default=256, help="memory of a machine")
    parser.add_argument("--usable", type=float, default=0.75, help="share of it that codes and graphs may take")
    parser.add_argument("--ram-price", type=float, default=3.0, help="money per GB of memory and month")
    parser.add_argument("--disk-price", type=float, default=0.1, help="money per GB of disk and month")
    parser.add_argument("--read-us", type=float, default=100, help="microseconds of one random read from the disk")
    parser.add_argument("--replicas", type=int, default=1)
    given = parser.parse_args()
    items, width, shard = int(given.items), given.width, int(given.shard)
    plans = [
        *embedded(items, width),
        postgres(items, width, shard),
        structure("Qdrant", width),
        structure("Milvus", width),
    ]
    print(f"{items:,} items, {width} dimensions\n\nPer item, bytes\n")
    table(
        ("plan", "in memory", "on disk", "rests on"),
        ((p.name, f"{p.memory:,.0f}", f"{p.disk:,.0f}", p.rests_on) for p in plans),
    )
    print(f"All items ({given.replicas} copies; machines of {given.node_gb:g} GB, {given.usable:.0%} of it usable)\n")

    def whole(p: Plan) -> tuple[str, ...]:
        memory, disk = (x * items * given.replicas / GB for x in (p.memory, p.disk))
        size = memory / given.replicas / given.usable if p.one_machine else given.node_gb
        machines = given.replicas if p.one_machine else math.ceil(memory / (size * given.usable))
        money = machines * size * given.ram_price + disk * given.disk_price
        return p.name, f"{memory:,.0f}", f"{disk:,.0f}", f"{machines} x {size:,.0f} GB", f"{money:,.0f}"

    table(("plan", "memory, GB", "disk, GB", "machines", "money a month"), map(whole, plans))
    print("One query (one thread a shard), milliseconds, and the build\n")

    def times(p: Plan) -> tuple[str, ...]:
        known = not math.isnan(p.low_ms)
        cold = f"+{p.keep * given.read_us / 1000:,.0f}" if p.keep else "-"
        build = "-" if p.build_days is None else f"{p.build_days:,.1f}"
        return p.name, f"{p.low_ms:,.1f} to {p.high_ms:,.0f}" if known else "not measured", cold, build

    table(("plan", "all in memory", "if no full vector is", "build, processor days"), map(times, plans))
    print("Getting the vectors in, one writer\n")
    table(("into", "hours", "rests on"), loading(items, width))
    print(
        f"assumed, not measured: {given.ram_price:g} a GB of memory and {given.disk_price:g} a GB of disk a month, "
        f"{given.read_us:g} us a random read, one read after the other"
    )


if __name__ == "__main__":
    main()
