"""Which plans are worth measuring: every first stage the index can run, at the full width and at its halves."""

from matryo.core.codecs import codec
from matryo.core.errors import InputError
from matryo.core.plan import Plan, Stage
from matryo.index.funnel import CODES, SCANS, check_plan

KEEP = 100
"""A place-holder: the shortlist is calibrated."""
PRODUCT_BYTES = (16, 32, 64)
OPTIONS: dict[str, tuple[tuple[str, int], ...]] = {"flat": (), "hnsw": (("M", 32), ("ef", 100)), "ivf": ()}
GRAPH_ITEMS = 50_000
"""Graphs and cells are tried from so many items on; below, an exhaustive scan of a short code is as fast."""


def candidates(full: int, items: int, widths: list[int] | None = None) -> list[Plan]:
    """Two stages each: a scan of a code, then exact scores at full width; and full width alone.

    The full width takes part in every code, so a code of all dimensions competes with one of a prefix at equal bytes.
    """
    chosen = halves(full) if widths is None else widths
    found = [Plan((Stage(full, "float32"),))]
    for scan in SCANS:
        if scan != "flat" and items < GRAPH_ITEMS:
            continue
        for width in chosen if scan == "flat" else chosen[1:4]:
            for code in _codes(scan):
                plan = _runs(width, code, scan, full)
                if plan is not None:
                    found.append(plan)
    return found


def halves(full: int) -> list[int]:
    """The full width, a half, a quarter and so on down to a thirty-second, in multiples of 8."""
    short = [full >> n for n in range(1, 6)]
    return [full, *[width // 8 * 8 for width in short if width >= 8]]


def least_bytes(plan: Plan) -> int:
    """Bytes an item's code takes at least in memory; 0 where the first stage reads the vectors file."""
    first = plan.stages[0]
    return 0 if len(plan.stages) == 1 else codec(first.code, first.width).bytes_per_item


def _codes(scan: str) -> list[str]:
    """Codes by name; the wide floats only where they are all there is to scan."""
    names = [code for code in CODES if not code.startswith("pq")]
    names += [f"pq{n}" for n in PRODUCT_BYTES if any(code.startswith("pq") for code in CODES)]
    return names if scan == "flat" else [name for name in names if name not in ("float32", "bfloat16")]


def _runs(width: int, code: str, scan: str, full: int) -> Plan | None:
    """The plan if the index can run it."""
    try:
        options = OPTIONS.get(scan, ())
        plan = check_plan(Plan((Stage(width, code, scan, options, KEEP), Stage(full, "float32"))), full)
        least_bytes(plan)
    except InputError:
        return None
    return None if (width, code) == (full, "float32") else plan
