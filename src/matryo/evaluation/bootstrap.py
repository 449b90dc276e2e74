"""The bootstrap: one set of resamples for every row of a report, so that any two rows can be compared in pairs.

Letters: Q queries (or sentence pairs), S resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError

Float64s = NDArray[np.float64]

BLOCK_ELEMENTS = 1 << 18
"""Resample counts held at a time: 2 MB of float64, so that the passes over them read a cache and not memory."""


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: percentile bootstrap over queries, seeded; the same resamples for every quantity."""

    items: int
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise InputError(f"resamples must be at least 2, got {self.resamples}; 1000 is usual")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence must lie between 0 and 1, got {self.confidence}; 0.95 is usual")

    def counts(self) -> Iterator[tuple[slice, Float64s]]:
        """Yield (which resamples, counts_SQ): how often each query was drawn in each resample; rows sum to Q."""
        rng = np.random.default_rng(self.seed)
        rows = max(1, BLOCK_ELEMENTS // self.items)
        for start in range(0, self.resamples, rows):
            size = min(rows, self.resamples - start)
            drawn = rng.integers(0, self.items, size=(size, self.items))
            drawn += np.arange(size)[:, None] * self.items
            counts = np.bincount(drawn.ravel(), minlength=size * self.items).reshape(size, self.items)
            yield slice(start, start + size), counts.astype(np.float64)

    def interval(self, draws_S: Float64s) -> tuple[float, float]:
        """The percentile interval of a statistic's resampled values; undefined (NaN) resamples are left out."""
        tail = 50 * (1 - self.confidence)
        known = draws_S[np.isfinite(draws_S)]
        if len(known) == 0:
            return float("nan"), float("nan")
        low, high = np.percentile(known, [tail, 100 - tail])
        return float(low), float(high)


def mean_draws(columns: Sequence[Float64s], resampling: Resampling) -> list[Float64s]:
    """The mean of each (Q,) column in every resample, as (S,) arrays, by one matrix product per block of resamples."""
    values_QC = np.stack(columns, axis=1)
    draws = np.empty((resampling.resamples, len(columns)))
    for which, counts in resampling.counts():
        draws[which] = counts @ values_QC / resampling.items
    return list(draws.T.copy())


def spearman(first: Float64s, second: Float64s) -> float:
    """Spearman's rank correlation with average ranks for ties; NaN where either side is constant."""
    ones = np.ones((len(first), 1))
    return float(_correlation(ones, _Ranks(first).centred(ones), _Ranks(second).centred(ones))[0])


def spearman_draws(columns: Sequence[Float64s], gold: Float64s, resampling: Resampling) -> list[Float64s]:
    """Spearman's correlation of each (Q,) column with `gold` in every resample, ranks taken anew inside each.

    A resample is a count per pair, and the average rank of a value in it is the count below plus half of (the count at
    the value plus 1). So no resample is sorted: one sort per column, then running sums of counts.
    """
    ranked = [_Ranks(column) for column in columns]
    gold_ranked = _Ranks(gold)
    draws = [np.empty(resampling.resamples) for _ in columns]
    for which, counts_SQ in resampling.counts():
        # Resamples run along rows here: every step below then works on whole contiguous rows.
        counts_QS = np.ascontiguousarray(counts_SQ.T)
        gold_QS = gold_ranked.centred(counts_QS)
        for column, out in zip(ranked, draws, strict=True):
            out[which] = _correlation(counts_QS, column.centred(counts_QS), gold_QS)
    return draws


class _Ranks:
    """Average ranks of fixed values under changing counts."""

    def __init__(self, values: Float64s) -> None:
        unique, place = np.unique(values, return_inverse=True)
        self._order = np.argsort(place, kind="stable")
        self._starts = np.searchsorted(place[self._order], np.arange(len(unique)))
        self._place = place

    def centred(self, counts_QS: Float64s) -> Float64s:
        """(Q, S) ranks of the values, each standing `counts` times, less their mean, which is always (Q + 1) / 2."""
        at = counts_QS[self._order]
        if len(self._starts) < len(at):
            at = np.add.reduceat(at, self._starts, axis=0)
        ranks = np.cumsum(at, axis=0)
        at /= 2
        ranks -= at
        ranks -= len(counts_QS) / 2
        placed: Float64s = ranks[self._place]
        return placed


def _correlation(weights_QS: Float64s, x_QS: Float64s, y_QS: Float64s) -> Float64s:
    """Correlation of centred values in each column under weights; NaN where a side does not vary."""
    weighted = weights_QS * x_QS
    covariance, xx = np.einsum("qs,qs->s", weighted, y_QS), np.einsum("qs,qs->s", weighted, x_QS)
    yy = np.einsum("qs,qs->s", weights_QS * y_QS, y_QS)
    spread = np.sqrt(xx * yy)
    found: Float64s = np.divide(covariance, spread, out=np.full_like(spread, np.nan), where=spread > 0)
    return found
