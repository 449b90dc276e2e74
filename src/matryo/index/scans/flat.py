"""Flat scans of a column: Hamming distances of bits, faiss' exhaustive search over everything else, no copy of a code.

Hamming distances come as an array, of so many rows as a core's cache holds, and the lowest are picked by a limit: faiss
computes them with wide registers there, which its own top-k and range searches do not.
"""

from functools import partial
from typing import Any

import numpy as np

from matryo.core.codecs import Int8
from matryo.index.column import Column
from matryo.index.funnel import Lowest, barred_cost
from matryo.index.scans.common import Allowed, Float32s, Found, Scored, asked_first, filled, settled
from matryo.index.trained import faiss_module

COSTS_AT_A_TIME = 1 << 24
ROWS_AT_A_TIME = 1 << 19
"""Whose costs a core's cache holds while the lowest are picked."""
DENSE_SHARE = 4
"""From one row in so many on, selecting from all scores beats a heap."""
QUANTIZERS = {"float16": "QT_fp16", "bfloat16": "QT_bf16", "int8": "QT_8bit_uniform"}


def scan_column(column: Column, queries_QD: Float32s, n: int, end: int, allowed: Allowed | None) -> list[Scored]:
    """The n best rows among first:end for each query, ascending; the lower row among equals."""
    count = end if allowed is None else allowed.count
    if n >= count:
        every = np.arange(end) if allowed is None else allowed.rows
        return [(None, every) for _ in queries_QD]
    if column.name in ("float32", *QUANTIZERS) and n * DENSE_SHARE < end:
        return _by_faiss(column, queries_QD, n, end, allowed, count)
    return list(dense(column, queries_QD, n, end, allowed))


def dense(
    column: Column, queries_QD: Float32s, n: int, end: int, allowed: Allowed | None, hamming_of_bits: bool = True
) -> list[Found]:
    """The n best rows of the column up to `end`, by arrays of all costs. Hamming distances are scored as the cosines of
    the bits.
    """
    count = end - column.first
    barred = None if allowed is None else ~allowed.mask[column.first : end]
    step = min(max(1, count), ROWS_AT_A_TIME)
    at_a_time = max(1, COSTS_AT_A_TIME // step)
    found: list[Found] = []
    for first in range(0, len(queries_QD), at_a_time):
        some = queries_QD[first : first + at_a_time]
        costs_of, lowest = column.costs(some, hamming_of_bits), [Lowest(n) for _ in some]
        for start in range(0, count, step):
            stop = min(start + step, count)
            costs = costs_of(start, stop)
            if barred is not None:
                np.copyto(costs, barred_cost(costs), where=barred[start:stop])
            for one, row in zip(lowest, costs, strict=True):
                one.add(row, start)
        for one in lowest:
            kept, rows = one.found()
            scores = -kept.astype(np.float32)
            if kept.dtype.kind == "i":
                scores = 1 + np.float32(2 / column.width) * scores
            found.append((scores, rows + column.first))
    return found


def _by_faiss(
    column: Column, queries_QD: Float32s, n: int, end: int, allowed: Allowed | None, count: int
) -> list[Scored]:
    index = flat_index(column, end)
    queries = np.ascontiguousarray(queries_QD[:, : column.width])
    if isinstance(column.codec, Int8):
        queries = queries * column.codec.state["scale"]
    chosen = None if allowed is None else faiss_module().SearchParameters(sel=allowed.selector)
    ask = asked_first(n, count)
    scores_Qn, rows_Qn = index.search(queries, ask, params=chosen)

    def once_more(number: int, more: int) -> Found:
        if more == ask:
            return filled(scores_Qn[number], rows_Qn[number])
        scores, rows = index.search(queries[number : number + 1], more, params=chosen)
        return filled(scores[0], rows[0])

    return [settled(partial(once_more, number), n, count) for number in range(len(queries))]


def flat_index(column: Column, end: int) -> Any:
    """faiss' exhaustive index over the column's own array."""
    array = column.parts[0]
    known = column.view
    if known is not None and known[0] is array and known[1] == end:
        return known[2]
    faiss = faiss_module()
    if column.name == "float32":
        index = faiss.IndexFlatIP(column.width)
    else:
        kind = getattr(faiss.ScalarQuantizer, QUANTIZERS.get(column.name, "QT_8bit_uniform"))
        index = faiss.IndexScalarQuantizer(array.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        # What faiss calls 8 bit uniform decodes (code + .5) / 255 * span + least: here code - 128, exactly.
        trained = np.array([-128.5, 255.0] if array.dtype == np.uint8 else [], np.float32)
        faiss.copy_array_to_vector(trained, index.sq.trained)
    size = end * array.shape[1] * array.itemsize
    index.codes = faiss.MaybeOwnedVectorUInt8.create_view(faiss.swig_ptr(array.view(np.uint8)), size, index.codes.owner)
    index.ntotal, index.is_trained = end, True
    column.view = (array, end, index)
    return index
