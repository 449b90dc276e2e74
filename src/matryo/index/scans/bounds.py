"""Exact search by upper bounds: few rows are scored in full, and none that could be among the best is left out.

With a row x = (p, r) cut after `width` dimensions, p' its prefix in int8 and a query q = (a, b) cut alike,
<q, x> <= <a, p'> + |a| |p - p'| + |b| |r| (Cauchy-Schwarz twice). The two lengths are stored as two more dimensions of
the code, rounded up, and |a|, |b| as two more of the query, so that faiss' scan of the codes ranks rows by this bound.
Rows are scored in full in that order until the next bound is below the n-th best score.

The width is the narrowest of half, three quarters and all of the dimensions at which a sample of rows, taken as
queries, needs few full scores: half where the spectrum falls, as in a nested model, all where it is flat. Panorama
(faiss' `IndexFlatIPPanorama`) prunes by the same inequality, but keeps the full float32 rows, four to eight times the
memory of this, and was half as quick.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.codecs import Codec, Codes, Float32s
from matryo.core.errors import InputError
from matryo.index.column import Column
from matryo.index.funnel import best
from matryo.index.scans.common import Allowed, Rows, filled
from matryo.index.scans.flat import flat_index
from matryo.index.trained import faiss_module

NAME = "bounds"
LENGTHS = 120
"""Lengths are counted in steps of 1 / LENGTHS; a stored row may be a little longer than 1 and still fits 127."""
SLACK = 2e-3
"""Above what the bound can be off by: rows lie in float16, and were renormalised before they were coded."""
LINE = 16
TRIED = 24
FEW = 200
"""The sample's queries must need at most FEW rows, plus one in FEW, or the next wider code is tried."""
GIVE_UP = 16
"""When more than one row in so many would have to be scored in full, scoring all of them is as quick."""


class Bounds(Codec):
    """(N, D) unit rows -> (N, width + 2 + padding) int8: the prefix, and the lengths of its error and of the rest."""

    name = NAME

    def __init__(self, full: int) -> None:
        super().__init__(full)
        self.scale: Float32s | None = None

    def fit(self, prefixes: Float32s) -> "Bounds":
        checked = self._checked(prefixes)
        step = max(1, len(checked) // TRIED)
        for width in sorted({-(-self.width // 2), -(-3 * self.width // 4), self.width}):
            self.scale = np.maximum(np.abs(checked[:, :width]).max(axis=0), 1e-6).astype(np.float32) / np.float32(127)
            if width == self.width:
                break
            bounds = self.queries(checked[::step][:TRIED]) @ self.encode(checked).T.astype(np.float32)
            scores = checked[::step][:TRIED] @ checked.T
            tenth = np.partition(scores, -min(11, len(checked)), axis=1)[:, -min(11, len(checked))]
            needed = (bounds >= tenth[:, None]).sum(axis=1)
            if np.quantile(needed, 0.9) <= FEW + len(checked) // FEW:
                break
        return self

    @property
    def _fitted(self) -> Float32s:
        if self.scale is None:
            raise InputError("these bounds have no scale yet; call fit(vectors) first")
        return self.scale

    @property
    def bytes_per_item(self) -> int:
        return -(-(len(self._fitted) + 2) // LINE) * LINE

    def encode(self, prefixes: Float32s) -> Codes:
        scale = self._fitted
        codes = np.zeros((len(prefixes), self.bytes_per_item), np.int8)
        cut = prefixes[:, : len(scale)]
        codes[:, : len(scale)] = np.clip(np.rint(cut / scale), -127, 127)
        error = cut - codes[:, : len(scale)] * scale
        for place, part in enumerate((error, prefixes[:, len(scale) :])):
            length = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))
            codes[:, len(scale) + place] = np.ceil(length * LENGTHS)
        return codes

    def decode(self, codes: Codes) -> Float32s:
        """(N, D) rows as far as the prefix is known, zeros beyond it."""
        scale = self._fitted
        out = np.zeros((len(codes), self.width), np.float32)
        out[:, : len(scale)] = codes[:, : len(scale)] * scale
        return out

    def queries(self, queries_QD: Float32s) -> Float32s:
        """(Q, bytes_per_item) whose products with codes are the upper bounds."""
        scale = self._fitted
        out = np.zeros((len(queries_QD), self.bytes_per_item), np.float32)
        out[:, : len(scale)] = queries_QD[:, : len(scale)] * scale
        for place, part in enumerate((queries_QD[:, : len(scale)], queries_QD[:, len(scale) :])):
            out[:, len(scale) + place] = np.linalg.norm(part, axis=1) / LENGTHS
        return out

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        return {"scale": self._fitted}

    def load(self, state: dict[str, NDArray[Any]]) -> "Bounds":
        scale = np.asarray(state["scale"], np.float32) if set(state) == {"scale"} else np.empty(0, np.float32)
        if not (1 <= len(scale) <= self.width) or not (np.isfinite(scale) & (scale > 0)).all():
            raise InputError(f"bounds of {self.width} dimensions need 'scale': up to {self.width} positive numbers")
        self.scale = scale
        return self


def exact_rows(
    column: Column,
    query_D: Float32s,
    n: int,
    end: int,
    allowed: Allowed | None,
    exact: Callable[[Rows], Float32s],
) -> Rows | None:
    """Every row among 0:end that may be one of the n best by full-width score, ascending; None where they are too many.

    Args:
        exact: full-width scores of ascending rows.
    """
    codec = column.codec
    if not isinstance(codec, Bounds):
        raise TypeError(f"needs a column of bounds, got {column.name}")
    index, query = flat_index(column, end), codec.queries(query_D[None])
    count = end if allowed is None else allowed.count
    chosen = None if allowed is None else faiss_module().SearchParameters(sel=allowed.selector)
    ask = 4 * n + 64
    while ask < end // GIVE_UP:
        bounds, rows = filled(*(found[0] for found in index.search(query, min(ask, count), params=chosen)))
        order = np.argsort(rows)
        bounds, rows = bounds[order], rows[order]
        # The n best bounds give the threshold; then only what reaches it is scored in full.
        scores = exact(rows[best(-bounds, 2 * n)])
        least = np.partition(scores, -n)[-n] if len(scores) >= n else -np.inf
        if len(rows) >= count or bounds.min() < least - SLACK:
            return rows[bounds >= least - SLACK]
        ask *= 4
    return None
