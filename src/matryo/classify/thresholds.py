"""Thresholds of a cascade from a calibration split: the cheapest for each price of an error.

Letters: N calibration items, L widths.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Float64s = NDArray[np.float64]
PRICES = 60
"""Prices of an error that are tried, from one dimension to full width for a single item."""
SWEEPS = 10
STEPS = 33
"""Thresholds tried that are the same at every width."""
NEVER = np.inf
"""The threshold of a width whose head is not evaluated at all."""


def levels_of(confidences_NL: Floats, thresholds: Float64s) -> NDArray[np.int64]:
    """(N,) the level each item stops at: the first whose confidence reaches its threshold, else the last."""
    stops = confidences_NL[:, :-1] >= thresholds
    last = confidences_NL.shape[1] - 1
    found: NDArray[np.int64] = (
        np.where(stops.any(axis=1), stops.argmax(axis=1), last) if last else np.zeros(len(stops), int)
    )
    return found


def paid(widths: NDArray[np.int64], thresholds: Float64s, tied: bool = False) -> NDArray[np.int64]:
    """(L,) dimensions read by an item that stops at each level: the sum over every head evaluated on the way.

    Tied heads go on from each other's sums, so they read a dimension once.
    """
    if tied:
        return widths
    evaluated = np.append(thresholds < NEVER, True)
    total: NDArray[np.int64] = np.cumsum(widths * evaluated)
    return total


def frontier(
    confidences_NL: Floats, right_NL: NDArray[np.bool_], widths: NDArray[np.int64], tied: bool = False
) -> list[Float64s]:
    """Thresholds from the dearest (full head alone) to the cheapest, each the best found for one price of an error."""
    full = int(widths[-1])
    found = {}
    for price in np.geomspace(1, full * len(right_NL), PRICES):
        thresholds = _best(confidences_NL, ~right_NL * price, widths, tied)
        found[thresholds.tobytes()] = thresholds
    # Prices reach the corners of the convex hull alone; one threshold for all widths from a first one on fills between.
    for first in range(len(widths) - 1):
        for share in np.linspace(0, 1, STEPS):
            even = np.full(len(widths) - 1, NEVER)
            even[first:] = np.quantile(confidences_NL[:, first], share)
            found[even.tobytes()] = even
    alone = np.full(len(widths) - 1, NEVER)
    found[alone.tobytes()] = alone

    def point(thresholds: Float64s) -> tuple[float, float]:
        levels = levels_of(confidences_NL, thresholds)
        return float(paid(widths, thresholds, tied)[levels].mean()), -float(
            right_NL[np.arange(len(levels)), levels].mean()
        )

    # From the cheapest up, what is no more accurate than something cheaper is left out.
    kept: list[Float64s] = []
    best = 1.0
    for (cost, error), thresholds in sorted(((point(t), t) for t in found.values()), key=lambda pair: pair[0]):
        if thresholds is not alone and cost < full and error < best:
            kept.append(thresholds)
            best = error
    return [alone, *reversed(kept)]


def _best(confidences_NL: Floats, losses_NL: Float64s, widths: NDArray[np.int64], tied: bool) -> Float64s:
    """Thresholds by exact minimisation over one at a time until none improves: cost + loss falls at every step."""
    levels = len(widths)
    thresholds = np.full(levels - 1, NEVER)
    for _ in range(SWEEPS):
        before = thresholds.copy()
        for level in reversed(range(levels - 1)):
            reached = ~(confidences_NL[:, :level] >= thresholds[:level]).any(axis=1)
            # What going on would cost: the rest of the cascade as it stands.
            rest = thresholds[level + 1 :]
            stops = levels_of(confidences_NL[reached, level + 1 :], rest)
            onward = (
                paid(widths[level + 1 :], rest, tied)[stops]
                + np.take_along_axis(losses_NL[reached, level + 1 :], stops[:, None], axis=1).ravel()
            )
            thresholds[level] = _one(
                confidences_NL[reached, level], losses_NL[reached, level], onward, int(widths[level]), tied
            )
        if np.array_equal(before, thresholds):
            break
    return thresholds


def _one(confidences_R: Floats, here_R: Float64s, onward_R: Float64s, width: int, tied: bool) -> float:
    """The threshold of one level: those above it stop. Halfway between two confidences, so rounding moves no item.

    Its head costs its width for whoever reaches it; tied, for who stops there, as the others' next head contains it.
    """
    if not len(confidences_R):
        return NEVER
    order = np.argsort(-confidences_R, kind="stable")
    sorted_R = confidences_R[order]
    stopping = here_R + width if tied else here_R
    all_pay = 0 if tied else len(order) * width
    totals = all_pay + onward_R.sum() + np.cumsum(stopping[order] - onward_R[order])
    edges = np.append(sorted_R[1:] < sorted_R[:-1], True)
    totals[~edges] = np.inf
    best = int(np.argmin(totals))
    if totals[best] >= onward_R.sum():
        return NEVER
    return 0.0 if best + 1 == len(order) else float((float(sorted_R[best]) + float(sorted_R[best + 1])) / 2)
