"""Prefixes: cut to a width, renormalise. And the nesting: which widths a model was trained for.

Letters in array names: N items, Q queries, B batch, D full width, d a width, L number of widths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError

Floats = NDArray[np.floating[Any]]
Array = TypeVar("Array")


def check_width(width: object, full: int) -> int:
    """Return `width` as an int if it is an integer in 1..full (a bool is not an integer here); else raise."""
    if isinstance(width, bool) or not isinstance(width, (int, np.integer)):
        raise InputError(f"width must be an integer in 1..{full}, got {width!r}")
    if not 1 <= width <= full:
        raise InputError(f"width {width} is outside 1..{full} (the vectors have {full} dimensions)")
    return int(width)


def truncate(x: Array, width: int) -> Array:
    """The first `width` dimensions of each row, scaled back to unit length.

    Args:
        x: (..., D) numpy array or torch tensor. A tensor keeps its device and its gradient.
        width: d in 1..D.

    Returns:
        (..., d), the kind and dtype of `x`; every row has length 1, except that a row whose prefix is all zeros stays
        zero (and passes no gradient). Norms are taken in float32 or wider. Matryoshka Representation Learning
        (arXiv 2205.13147), section 3, applied to retrieval: each prefix is an embedding of its own.

    Raises:
        InputError (a ValueError): `width` is outside 1..D; names both.
    """
    tensor: Any = x
    d = check_width(width, tensor.shape[-1])
    prefix = tensor[..., :d]
    if isinstance(prefix, np.ndarray):
        if prefix.dtype.kind != "f":
            raise InputError(f"vectors must be floating point, got {prefix.dtype}")
        kind = np.promote_types(prefix.dtype, np.float32)
        whole: Any = prefix.astype(kind, copy=False) * inverse_norms(prefix)[..., None].astype(kind)
        rows: Array = whole.astype(prefix.dtype, copy=False)
        return rows
    wide = prefix.float() if prefix.element_size() < 4 else prefix
    squares = (wide * wide).sum(-1, keepdim=True)
    scale = (squares + (squares == 0)) ** -0.5 * (squares > 0)
    unit: Array = (wide * scale).to(prefix.dtype)
    return unit


def inverse_norms(x: Floats) -> Floats:
    """1 / length of each row of `x` (..., d), as float64; 0 where the row is all zeros."""
    squares = np.einsum("...d,...d->...", x, x, dtype=np.float64)
    inverse: Floats = np.divide(1.0, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)
    return inverse


@dataclass(frozen=True, init=False)
class Nesting:
    """The widths d_1 < ... < d_L = D a model is trained at, and the weight c_d of each width's loss.

    The nested loss is the plain sum over widths of c_d * L(prefix d) (arXiv 2205.13147, equation 1), not a mean: adding
    a width adds its term and leaves the others as they were. Weights default to 1.

    >>> Nesting([64, 128, 256]).D
    256
    """

    widths: tuple[int, ...]
    weights: tuple[float, ...]

    def __init__(self, widths: Sequence[int], weights: Sequence[float] | None = None) -> None:
        got = list(widths)
        if not got:
            raise InputError("a nesting needs at least one width")
        for width in got:
            if isinstance(width, bool) or not isinstance(width, (int, np.integer)) or width < 1:
                raise InputError(f"widths must be integers >= 1, got {width!r} in {got}")
        if any(a >= b for a, b in pairwise(got)):
            raise InputError(f"widths must rise strictly, got {got}; try {sorted(set(got))}")
        scale = [1.0] * len(got) if weights is None else [float(w) for w in weights]
        if len(scale) != len(got):
            raise InputError(f"{len(got)} widths need {len(got)} weights, got {len(scale)}")
        if not all(np.isfinite(w) and w >= 0 for w in scale):
            raise InputError(f"weights must be finite and >= 0, got {scale}")
        if not any(scale):
            raise InputError("every weight is 0, so there would be nothing to train; give one width a weight above 0")
        object.__setattr__(self, "widths", tuple(int(w) for w in got))
        object.__setattr__(self, "weights", tuple(scale))

    @classmethod
    def doubling(cls, first: int, last: int) -> "Nesting":
        """first, 2 first, 4 first, ... and `last`, which is always included."""
        if not 1 <= first <= last:
            raise InputError(f"doubling needs 1 <= first <= last, got first={first}, last={last}")
        widths = [first]
        while widths[-1] * 2 <= last:
            widths.append(widths[-1] * 2)
        return cls(widths if widths[-1] == last else [*widths, last])

    @property
    def D(self) -> int:  # noqa: N802 - the field's letter
        """Full width."""
        return self.widths[-1]

    @property
    def blocks(self) -> list[slice]:
        """The columns each width adds to the one before it: [0:d_1], [d_1:d_2], ..."""
        return [slice(a, b) for a, b in zip((0, *self.widths[:-1]), self.widths, strict=True)]

    def check(self, full: int) -> None:
        """Raise unless vectors of `full` dimensions fit this nesting exactly."""
        if full != self.D:
            raise InputError(
                f"the nesting ends at width {self.D} but the vectors have {full} dimensions; "
                f"end the widths with {full}, for example {[w for w in self.widths if w < full] + [full]}"
            )

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.widths, self.weights, strict=True))

    def __len__(self) -> int:
        return len(self.widths)
