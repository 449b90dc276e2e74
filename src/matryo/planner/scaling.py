"""From sizes that were measured to one that was not: a few straight lines, and how far off they were.

A search is three parts, each measured by itself: the first stage's scan, what comes after it (reranks and the last
ordering), and the rest of the call. With N items and a first shortlist of n:

    scan  = measured + b (N - measured N) + g (n - measured n)
                                for flat scans, b and g measured over the same codes repeated, see `Sample`
            a + b N                          for cells
            a N^b                            for graphs, 0 <= b <= 0.4: log N steps, each dearer once caches are full
    after = c + d n     with what a row takes more once all vectors to come lie in memory, see `Sample`
    rest  = its median
    n     = e N^f       0 <= f <= 1: the shortlist that keeps the recall, longer by what the promise adds to it

Lines are fitted to relative errors, with a, b, c, d >= 0; large sizes weigh more, in proportion, for what no longer
fits a cache takes longer. The error that is reported is of the same lines fitted
without the largest size, at that size.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
GRAPH_POWER = 0.4


@dataclass(frozen=True)
class Measured:
    """One plan on so many items. Milliseconds are medians of single queries through `Index.search`."""

    items: int
    keep: int
    """Rows the first stage hands on."""
    least: int
    """Rows that give the recall on average over a few queries; `keep` of the largest size is what is promised."""
    ms: float
    ms_low: float
    ms_high: float
    scan_ms: float
    after_ms: float
    code_bytes: int
    disk_bytes: int
    build_s: float
    item_ms: float | None = None
    """What a further item adds to the scan, once the codes are several times as many; None where that is not known."""
    row_ms: float = 0
    """What a row that is handed on adds to the later stages, once as many vectors lie there as are to come."""
    kept_ms: float = 0
    """What one more row to hand on adds to the scan, where `item_ms` is known."""


@dataclass(frozen=True)
class Predicted:
    """One plan on a number of items that was not measured."""

    items: int
    keep: int
    ms: float
    code_bytes: float
    disk_bytes: float
    build_s: float


def predict(measured: list[Measured], items: int, graph: bool, margin: float | None = None) -> Predicted:
    """What is to be expected at `items`, from one or more sizes; at the largest of them, what was measured."""
    last = measured[-1]
    if items == last.items:
        return Predicted(items, last.keep, last.ms, last.code_bytes, last.disk_bytes, last.build_s)
    # Exact search goes by codes from some size on; what was measured without them says nothing of what is to come.
    measured = [m for m in measured if bool(m.code_bytes) == bool(last.code_bytes)]
    sizes = np.array([m.items for m in measured], dtype=np.float64)
    keeps = np.array([m.keep for m in measured], dtype=np.float64)
    margin = last.keep / last.least if margin is None else margin
    # More items never need a shorter shortlist, whatever a fit to noise says.
    least = max(float(last.least), _power(sizes, np.array([m.least for m in measured], dtype=np.float64), items))
    keep = margin * least
    scans = np.array([m.scan_ms for m in measured])
    if graph:
        scan = _power(sizes, scans, items, GRAPH_POWER)
    elif last.item_ms is None or items < last.items:
        scan = _line(sizes, scans, float(items))
    else:
        scan = last.scan_ms + last.item_ms * (items - last.items) + last.kept_ms * (keep - last.keep)
    after = _line(keeps, np.array([m.after_ms + m.row_ms * m.keep for m in measured]), keep)
    rest = float(np.median([max(0.0, m.ms - m.scan_ms - m.after_ms) for m in measured]))
    build = sizes * np.log(sizes) if graph else sizes
    at = items * float(np.log(items)) if graph else float(items)
    return Predicted(
        items,
        min(items, int(np.ceil(keep))),
        scan + after + rest,
        _line(sizes, np.array([m.code_bytes for m in measured], dtype=np.float64), items),
        _line(sizes, np.array([m.disk_bytes for m in measured], dtype=np.float64), items),
        _line(build, np.array([m.build_s for m in measured]), at),
    )


def held_out(measured: list[Measured], graph: bool) -> tuple[float, float] | None:
    """Relative errors of milliseconds and code bytes at the largest size, from the others; None with fewer than two."""
    if len(measured) < 3:
        return None
    last = measured[-1]
    # What rows take more is of the items to come; up to the last size it is as much less as they take more from there.
    before = [replace(m, row_ms=max(0.0, m.row_ms - last.row_ms)) for m in measured[:-1]]
    said = predict(before, last.items, graph, last.keep / last.least)
    return said.ms / last.ms - 1, (said.code_bytes + 1) / (last.code_bytes + 1) - 1


def _line(x: Floats, y: Floats, at: float) -> float:
    """a + b `at` of the line a, b >= 0 that fits y with the least squared relative error, each times its x."""
    if not y.any():
        return 0.0
    y = np.maximum(y, 1e-9)
    if len(x) == 1:
        return float(y[0] * at / x[0]) if at > x[0] else float(y[0])
    weigh = x / x.max() / y
    columns = np.stack([np.ones_like(x), x], axis=1) * weigh[:, None]
    a, b = np.linalg.lstsq(columns, weigh * y, rcond=None)[0]
    if b < 0:
        a, b = float((weigh**2 * y).sum() / (weigh**2).sum()), 0.0
    elif a < 0:
        a, b = 0.0, float((weigh**2 * x * y).sum() / ((weigh * x) ** 2).sum())
    return float(a + b * at)


def _power(x: Floats, y: Floats, at: float, most: float = 1.0) -> float:
    """e `at`^f of the power law that fits y best on a log scale, 0 <= f <= most; from one size, f = most."""
    y, centre = np.maximum(y, 1e-9), np.log(x) - np.log(x).mean()
    slope = most if len(x) == 1 else float(np.clip((centre * np.log(y)).sum() / (centre**2).sum(), 0, most))
    return float(np.exp(np.log(y).mean() + slope * (np.log(at) - np.log(x).mean())))
