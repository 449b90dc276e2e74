"""What every scan shares: the rows that may come back, and a fixed choice among equals."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.index.funnel import best
from matryo.index.trained import faiss_module

Float32s = NDArray[np.float32]
Rows = NDArray[np.int64]
Found = tuple[Float32s, Rows]
"""Scores, larger is better, and rows of one query."""
Scored = tuple[Float32s | None, Rows]
"""The same; no scores where all rows came back unscored."""


class Allowed:
    """The rows that may come back, of rows 0..len(mask)-1: live ones, or live ones that match a filter."""

    def __init__(self, mask_N: NDArray[np.bool_]) -> None:
        self.mask = mask_N

    @cached_property
    def rows(self) -> Rows:
        """The rows, ascending."""
        return np.flatnonzero(self.mask)

    @cached_property
    def count(self) -> int:
        """How many."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def selector(self) -> Any:
        """faiss' view of the mask (its length is in bytes); a row beyond it is not allowed."""
        self._bits = np.packbits(self.mask, bitorder="little")
        return faiss_module().IDSelectorBitmap(len(self._bits), faiss_module().swig_ptr(self._bits))


def settled(search: Callable[[int], Found], n: int, most: int) -> Found:
    """The n best rows of one query, the lower row among equals at the edge, from a search that breaks ties as it likes.

    Asks for a few more than n, until the last score is below the n-th: then every row that ties with the n-th is there.

    Args:
        search: gives up to so many rows, best first; fewer where there are no more.
        most: how many rows there are at most.
    """
    ask = asked_first(n, most)
    while True:
        scores, rows = search(ask)
        if len(rows) < ask or ask >= most or scores[-1] < scores[n - 1]:
            return first(scores, rows, n)
        ask = min(most, 2 * ask)


def asked_first(n: int, most: int) -> int:
    """How many rows `settled` asks for at first."""
    return min(most, n + n // 8 + 8)


def first(scores: Float32s, rows: Rows, n: int) -> Found:
    """The n best of these rows in ascending order, the lower row among equals."""
    order = np.argsort(rows)
    scores, rows = scores[order], rows[order]
    if len(rows) > n:
        chosen = best(-scores, n)
        scores, rows = scores[chosen], rows[chosen]
    return scores, rows


def filled(scores: Float32s, rows: Rows) -> Found:
    """Without the places that faiss left empty."""
    if len(rows) and rows[-1] >= 0:
        return scores, rows
    there = rows >= 0
    return scores[there], rows[there]
