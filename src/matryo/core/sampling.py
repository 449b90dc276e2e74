"""Sampled widths: a step trains some of the widths, and on average all of them."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting


class WidthSampler:
    """Draws a part of a nesting for each training step, so that loss and gradient are right in expectation.

    The full width is always kept. Of the P shorter widths whose weight is above 0, keep - 1 are drawn, every subset of
    that size equally likely; a drawn width is in a step with probability (keep - 1) / P and its weight is divided by
    it. So the mean over draws of the sampled nested loss is the nested loss (arXiv 2205.13147, equation 1), and the
    mean of its gradient is the gradient; a larger `keep` means less noise. A width of weight 0 adds nothing to the loss
    and is never drawn.

    For training only: an evaluation measures every width. Something that belongs to one width, such as a head or a
    temperature of its own, gets no gradient in a step that leaves its width out; a value per width is picked by width,
    for example `[values[nesting.widths.index(d)] for d in drawn.widths]`. Every draw has `keep` widths.

    >>> drawn = WidthSampler(Nesting([8, 16, 32, 64]), keep=2).draw(step=7)
    >>> len(drawn), drawn.D, max(drawn.weights)
    (2, 64, 3.0)
    """

    def __init__(self, nesting: Nesting, keep: int, seed: int = 0) -> None:
        """Take `keep` widths of `nesting` a step, the full width among them.

        Raises:
            InputError: `keep` outside 2..P+1, where a shorter width could never be drawn (1 if there is none); a seed
                that is no integer >= 0.
        """
        self._pool = tuple(n for n, (_, weight) in enumerate(list(nesting)[:-1]) if weight > 0)
        least, most = min(2, len(self._pool) + 1), len(self._pool) + 1
        if isinstance(keep, bool) or not isinstance(keep, (int, np.integer)) or not least <= keep <= most:
            reason = "the full width is always one of them, and each shorter width of weight above 0 must have a chance"
            raise InputError(f"keep must be an integer in {least}..{most} for {nesting}, got {keep!r}; {reason}")
        _check_count("seed", seed)
        self.nesting, self.keep, self.seed = nesting, int(keep), int(seed)

    def draw(self, step: int) -> Nesting:
        """The nesting of one step: a pure function of (seed, step), so that every process and a resumed run agree.

        Raises:
            InputError: `step` is no integer >= 0.
        """
        _check_count("step", step)
        chosen = np.random.default_rng([self.seed, int(step)]).choice(len(self._pool), self.keep - 1, replace=False)
        return self._part([self._pool[n] for n in sorted(chosen)])

    def outcomes(self) -> Iterator[Nesting]:
        """Every nesting a draw may give; all are equally likely."""
        return map(self._part, combinations(self._pool, self.keep - 1))

    def _part(self, chosen: Sequence[int]) -> Nesting:
        widths, weights = self.nesting.widths, self.nesting.weights
        scale = len(self._pool) / max(1, self.keep - 1)
        return Nesting([*(widths[n] for n in chosen), widths[-1]], [*(weights[n] * scale for n in chosen), weights[-1]])


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise InputError(f"{name} must be an integer >= 0, got {value!r}")
