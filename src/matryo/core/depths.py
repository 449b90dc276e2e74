"""Depths: how many layers of an encoder are run. The second axis of nesting, beside the widths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.core.sampling import WidthSampler

Alignment = Literal["kl", "cosine", "mse", "similarity", "neighbours"]


@dataclass(frozen=True)
class DepthNesting:
    """The depths k_1 < ... < k_K = all layers that a model is trained at, the weight of each, and its widths.

    The loss of layers x widths is the sum over depths of w_k times the nested loss at depth k, plus, for every depth
    but the last, w_k * align times a distance of its prefixes to those of the last layer (2D Matryoshka, arXiv
    2402.14776, section 3). Fixed pairs of depth and width, as in Starbucks (arXiv 2410.13230), are a nesting of its own
    for each depth.

    >>> DepthNesting.of([2, 4, 6], Nesting([64, 128])).depths
    (2, 4, 6)
    """

    depths: tuple[int, ...]
    weights: tuple[float, ...]
    nestings: tuple[Nesting, ...]
    """The widths trained at each depth."""
    align: float = 1.0
    alignment: Alignment = "kl"
    """How prefixes are compared with those of the last layer: see `matryo.losses.nested_distill`."""
    temperature: float | None = None
    """Of the alignments that have one; theirs if not given."""

    @classmethod
    def of(
        cls,
        depths: Sequence[int],
        nesting: Nesting,
        weights: Sequence[float] | None = None,
        widths: Sequence[Sequence[int]] | None = None,
        align: float = 1.0,
        alignment: Alignment = "kl",
        temperature: float | None = None,
    ) -> "DepthNesting":
        """From depths, the nesting of the model and, for fixed pairs, the widths of each depth.

        Raises:
            InputError: depths that do not rise or are no integers >= 1, weights or widths for another number of depths,
                a width that is not in the nesting, a last depth without the full width.
        """
        got = list(depths)
        if not got or any(isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1 for k in got):
            raise InputError(f"depths must be integers >= 1, at least one, got {got}")
        if any(a >= b for a, b in pairwise(got)):
            raise InputError(f"depths must rise strictly, got {got}; try {sorted(set(got))}")
        try:
            # A nesting of depths has the same laws for its weights.
            scale = Nesting(got, weights).weights
        except InputError as error:
            raise InputError(str(error).replace("width", "depth")) from error
        if scale[-1] == 0:
            raise InputError("the last depth must have a weight above 0: the others are held against it")
        if not (np.isfinite(align) and align >= 0):
            raise InputError(f"align must be finite and >= 0, got {align}")
        if temperature is not None and not 0 < temperature < np.inf:
            raise InputError(f"temperature must be finite and above 0, got {temperature}")
        if widths is not None and len(widths) != len(got):
            raise InputError(f"{len(got)} depths need {len(got)} lists of widths, got {len(widths)}")
        nestings = tuple(_part(nesting, own) for own in widths) if widths is not None else (nesting,) * len(got)
        if nestings[-1].D != nesting.D:
            raise InputError(f"the last depth must train the full width {nesting.D}, got {list(nestings[-1].widths)}")
        return cls(tuple(int(k) for k in got), scale, nestings, float(align), alignment, temperature)

    @property
    def deepest(self) -> int:
        """All layers."""
        return self.depths[-1]

    def check(self, layers: int) -> None:
        """Raise unless an encoder of so many layers fits."""
        if self.deepest != layers:
            kept = [k for k in self.depths if k < layers]
            raise InputError(
                f"the depths end at {self.deepest} but the encoder has {layers} layers; end them with {layers}, for "
                f"example {[*kept, layers]}"
            )

    def at(self, nesting: Nesting) -> "DepthNesting":
        """The same depths at other widths: those that are drawn for a step."""
        return replace(self, nestings=(nesting,) * len(self.depths))

    def __len__(self) -> int:
        return len(self.depths)


class DepthSampler:
    """Draws a part of the depths for each training step, the deepest among them, unbiased as `WidthSampler` is."""

    def __init__(self, depths: DepthNesting, keep: int, seed: int = 0) -> None:
        """Take `keep` depths a step.

        Raises:
            InputError: `keep` outside 2..K.
        """
        try:
            # Another stream of draws than that of the widths: the two must not go together.
            self._sampler = WidthSampler(Nesting(depths.depths, depths.weights), keep, seed + 1)
        except InputError as error:
            raise InputError(str(error).replace("width", "depth")) from error
        self.depths = depths

    def draw(self, step: int) -> DepthNesting:
        """The depths of one step, their weights scaled so that the mean over draws is the whole loss."""
        drawn = self._sampler.draw(step)
        places = [self.depths.depths.index(depth) for depth in drawn.widths]
        return replace(
            self.depths,
            depths=drawn.widths,
            weights=drawn.weights,
            nestings=tuple(self.depths.nestings[n] for n in places),
        )


def _part(nesting: Nesting, widths: Sequence[int]) -> Nesting:
    """The nesting of some of the widths, each with its weight."""
    for width in widths:
        if width not in nesting.widths:
            raise InputError(f"width {width} of a depth is not among the trained widths {list(nesting.widths)}")
    chosen = Nesting(widths)
    return Nesting(chosen.widths, [nesting.weights[nesting.widths.index(width)] for width in chosen.widths])
