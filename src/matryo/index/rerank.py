"""Exact scores of a shortlist: inner products of one query with rows of the mapped vectors file, by faiss.

Each row is summed by itself in one fixed order, whatever stands around it, which a matrix product does not promise:
equal vectors tie exactly and the lower row wins. Only the rows asked for are read, in ascending order, and other
threads run meanwhile.
"""

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.index.vectors import Float32s, Rows, Vectors


class Halves:
    """faiss' scanners of float16 rows of one width. Each serves one call at a time and is used again, never freed."""

    def __init__(self, width: int) -> None:
        self._faiss = import_module("faiss")
        self._kind = self._faiss.ScalarQuantizer(width, self._faiss.ScalarQuantizer.QT_fp16)
        self._idle: list[Any] = []

    def scores(self, query_D: Float32s, codes_RB: NDArray[np.uint8]) -> Float32s:
        """(R,) inner products of the query with float16 rows, given as bytes."""
        pointer, count = self._faiss.swig_ptr, len(codes_RB)
        try:
            scanner = self._idle.pop()
        except IndexError:
            scanner = self._kind.select_InvertedListScanner(self._faiss.METRIC_INNER_PRODUCT, None, False, None)
        # The scanner keeps the best of what it scans in a heap. With room for all it keeps all, by their places.
        places, which = np.arange(count), np.empty(count, np.int64)
        found, scores = np.full(count, -np.inf, np.float32), np.empty(count, np.float32)
        scanner.set_query(pointer(query_D))
        scanner.set_list(0, 0.0)
        scanner.scan_codes(count, pointer(codes_RB), pointer(places), pointer(found), pointer(which), count)
        self._idle.append(scanner)
        scores[which] = found
        return scores


halves_of = cache(Halves)


def inner_products(vectors: Vectors, query_D: Float32s, rows_R: Rows) -> Float32s:
    """(R,) float32 inner products of the query with these verified, ascending, distinct rows as they are stored."""
    faiss = import_module("faiss")
    pointer, count = faiss.swig_ptr, len(rows_R)
    query = np.ascontiguousarray(query_D, np.float32)
    if not count:
        return np.empty(0, np.float32)
    if vectors.store == "float32":
        vectors.ensure(rows_R)
        scores = np.empty(count, np.float32)
        rows = np.ascontiguousarray(rows_R, np.int64)
        faiss.fvec_inner_products_by_idx(
            pointer(scores), pointer(query), pointer(vectors.stored), pointer(rows), len(query), 1, count
        )
        return scores
    # A gather of half the bytes, then one pass that converts in registers.
    return halves_of(len(query)).scores(query, vectors.take_stored(rows_R).view(np.uint8))
