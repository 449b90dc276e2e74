"""Which plans are worth measuring: every first stage the index can run, at the full width and at its halves."""

from matryo.core.errors import InputError
from matryo.core.plan import Plan, Stage
from matryo.index.funnel import CODES, check_plan
from matryo.index.trained import index_codec

KEEP = 100
"""A place-holder: the shortlist is calibrated."""
PRODUCT_BYTES = (16, 32, 64)
Variant = tuple[str, tuple[tuple[str, int], ...], tuple[str, ...]]
CELLS = (("cells", 256), ("probe", 32))
VARIANTS: tuple[Variant, ...] = (
    ("flat", (), ()),
    ("ivf", (), ("binary",)),
    ("hnsw", (("M", 32), ("ef", 100)), ("float16", "int8", "int4")),
    ("ivf", CELLS, ("int4", "binary", "rabitq", "pq")),
)
"""Scan, its options, and the codes it is tried over, all if none is named. One cell of bits is a flat scan in which
the float query meets the bits; codes other than binary are scanned so anyway."""
GRAPH_ITEMS = 50_000
"""Graphs and cells are tried from so many items on; below, an exhaustive scan of a short code is as fast."""


SHARE = 4
"""Of a middle stage's shortlist to the first one's."""


def candidates(full: int, items: int, widths: list[int] | None = None) -> list[Plan]:
    """Two stages: a scan of a code, then exact scores at full width; three, with a wider code between a scan of few
    bits and the exact scores, so that fewer rows are read from the disk; and full width alone.

    The full width takes part in every code, so a code of all dimensions competes with one of a prefix at equal bytes.
    """
    chosen = halves(full) if widths is None else widths
    found = [Plan((Stage(full, "float32"),))]
    for scan, options, over in VARIANTS:
        if options and items < GRAPH_ITEMS:
            continue
        for width in chosen[1:4] if options else chosen:
            for code in _codes():
                if not over or code.rstrip("0123456789") in over or code in over:
                    found += _runs([Stage(width, code, scan, options, KEEP)], full)
    for width, wider in zip(chosen[2:5], chosen[1:4], strict=False):
        for code in ("binary", "int8"):
            stages = [Stage(width, "binary", keep=SHARE * KEEP), Stage(wider, code, keep=KEEP)]
            found += _runs(stages, full)
    for width in chosen[1:3] if items >= GRAPH_ITEMS else []:
        for code in ("int4", "pq32", "binary"):
            found += _runs([Stage(width, code, "ivf", (*CELLS, ("at", max(8, width // 2))), KEEP)], full)
    return found


def halves(full: int) -> list[int]:
    """The full width, a half, a quarter and so on down to a thirty-second, in multiples of 8."""
    short = [full >> n for n in range(1, 6)]
    return [full, *[width // 8 * 8 for width in short if width >= 8]]


def least_bytes(plan: Plan) -> int:
    """Bytes an item's codes take at least in memory; 0 where the first stage reads the vectors file."""
    return sum(index_codec(stage.code, stage.width).bytes_per_item for stage in plan.stages[:-1])


def _codes() -> list[str]:
    """Every code by name."""
    names = [code for code in CODES if not code.startswith("pq")]
    return names + [f"pq{n}" for n in PRODUCT_BYTES if len(names) < len(CODES)]


def _runs(stages: list[Stage], full: int) -> list[Plan]:
    """The plan that ends in exact scores, if the index can run it."""
    try:
        plan = check_plan(Plan((*stages, Stage(full, "float32"))), full)
        least_bytes(plan)
    except InputError:
        return []
    return [] if (stages[0].width, stages[0].code) == (full, "float32") else [plan]
