"""What to mine, checked at construction: a bad combination dies here, before anything is encoded."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting

RELATIVE_MARGIN = 0.95
"""Used when no margin is given: TopK-PercPos (95 %) of NV-Retriever (arXiv 2407.15831)."""


@dataclass(frozen=True, kw_only=True)
class Mining:
    """How hard negatives are chosen."""

    widths: tuple[int, ...] | None = None
    """Widths to mine at, ascending; the model's full width if unset. Each has its own negatives."""
    negatives: int = 1
    """Negatives per pair and width."""
    margin: float | None = None
    """Absolute, in 0..2: a candidate that scores above positive - margin is taken for a false negative."""
    relative_margin: float | None = None
    """In 0..1: a candidate that scores above positive - |positive| * (1 - factor) is taken for a false negative, which
    is positive * factor where the positive's cosine is above 0. 0.95 if neither margin is given."""
    ranks: tuple[int, int | None] = (1, None)
    """First and last rank looked at, both included. 1 is the nearest text that does not belong to the anchor."""
    sample: bool = False
    """Draw the negatives at random from the ranks, instead of the hardest first."""
    seed: int = 0
    batch_size: int = 64
    """Texts per forward pass of the model."""

    def __post_init__(self) -> None:
        if self.widths is not None:
            object.__setattr__(self, "widths", Nesting(self.widths).widths)
        _whole("negatives", self.negatives, 1)
        _whole("seed", self.seed, 0)
        _whole("batch_size", self.batch_size, 1)
        if self.margin is not None and self.relative_margin is not None:
            raise InputError("margin and relative_margin are two ways to say one thing; give one of them")
        if self.margin is not None and not (_number(self.margin) and 0 <= self.margin < 2):
            raise InputError(
                f"margin must be at least 0 and below 2, the range of cosines, got {self.margin!r}; try 0.05"
            )
        if self.relative_margin is not None and not (_number(self.relative_margin) and 0 < self.relative_margin <= 1):
            raise InputError(
                f"relative_margin must be above 0 and at most 1, a share of the positive's score, "
                f"got {self.relative_margin!r}; try {RELATIVE_MARGIN}"
            )
        self._check_ranks()

    def _check_ranks(self) -> None:
        first, last = self.ranks
        _whole("the first rank", first, 1)
        if last is not None:
            _whole("the last rank", last, 1)
            if last - first + 1 < self.negatives:
                raise InputError(
                    f"ranks {first}:{last} hold {max(0, last - first + 1)} candidates but {self.negatives} negatives "
                    f"were asked for; end the ranks at {first + self.negatives - 1} or later"
                )
        elif self.sample:
            raise InputError(f"sampling needs a last rank to draw from; for example ranks {first}:{first + 99}")

    def limits(self, positives_A: NDArray[Any]) -> NDArray[np.float64]:
        """(A,) highest score a negative may have, from the (A,) lowest positive score of each anchor."""
        scores_A: NDArray[np.float64] = positives_A.astype(np.float64)
        if self.margin is not None:
            return scores_A - self.margin
        share = RELATIVE_MARGIN if self.relative_margin is None else self.relative_margin
        return scores_A - np.abs(scores_A) * (1 - share)


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
