"""Search by a prefix alone: what an index that held nothing but the first `width` dimensions would answer, exactly.

The prefixes are read from the vectors file as they lie there. Nothing is kept in memory, so that any number of widths
may be asked for one after another; a plan `width:float32` is quicker from its second search on and keeps its column.
"""

import time

import numpy as np

from matryo.core.plan import Stage
from matryo.core.prefix import truncate
from matryo.index.column import products
from matryo.index.funnel import Float32s, Rows, StageReport, best
from matryo.index.scans.flat import COSTS_AT_A_TIME
from matryo.index.snapshot import FLOATS_AT_A_TIME, SLACK, View


def nearest(
    view: View, queries_QD: Float32s, width: int, k: int, reports: list[StageReport] | None = None
) -> list[tuple[Rows, Float32s]]:
    """The k best rows of each query by the cosine of the first `width` dimensions, the lower row first among equals.

    Args:
        view: the rows that may come back.
        queries_QD: unit rows of full width.
        width: 1..D. A row or a query whose prefix is all zeros scores 0.
        reports: gets one report when given.
    """
    stage, started = Stage(width, "float32"), time.perf_counter()
    queries_Qd, k = truncate(queries_QD, width), min(k, view.count)
    at_a_time = max(1, COSTS_AT_A_TIME // max(1, view.end))
    answers = []
    for start in range(0, len(queries_Qd), at_a_time):
        some = queries_Qd[start : start + at_a_time]
        for query_d, costs in zip(some, _costs(view, some), strict=True):
            rows = best(costs, k, SLACK)
            # Scored once more, every row the same way: equal prefixes tie exactly.
            scores = view.rescore(stage, query_d, rows)
            order = np.argsort(-scores, kind="stable")[:k]
            answers.append((rows[order], scores[order]))
    if reports is not None:
        each = [len(rows) for rows, _ in answers]
        taken = 1000 * (time.perf_counter() - started)
        reports.append(StageReport(str(stage), view.count * len(queries_QD), sum(each), taken, each))
    return answers


def _costs(view: View, queries_Qd: Float32s) -> Float32s:
    """(Q, N) minus the cosines of prefixes; infinite for rows that may not come back."""
    width, end = queries_Qd.shape[1], view.end
    out = np.empty((len(queries_Qd), end), np.float32)
    step = max(1, FLOATS_AT_A_TIME // width)
    for start in range(0, end, step):
        stop = min(start + step, end)
        prefixes = view.prefixes(start, stop, width)
        products(-queries_Qd, prefixes, out[:, start:stop])
        squares = np.einsum("nd,nd->n", prefixes, prefixes)
        out[:, start:stop] /= np.sqrt(np.where(squares > 0, squares, 1))
    if view.mask is not None:
        np.copyto(out, np.inf, where=~view.mask)
    return out
