"""Checks the losses share. All of them come before a gradient or any other state exists."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting

Number = float | Sequence[float] | Tensor
"""An option of a loss: one for all widths, one per width, or a tensor of either shape that may require a gradient."""


def check_embeddings(name: str, x: Tensor, nesting: Nesting, *, ndim: int = 2) -> None:
    """Raise unless `x` is (B, D), or (B, K, D) with ndim=3, floating, not empty, and ends where the nesting ends."""
    shape = "(B, D)" if ndim == 2 else "(B, K, D)"
    if x.ndim != ndim or not x.is_floating_point():
        raise InputError(f"{name} must be {shape} of floats, got {tuple(x.shape)} of {x.dtype}")
    if 0 in x.shape:
        raise InputError(f"{name} must be {shape} with at least one row, got {tuple(x.shape)}")
    nesting.check(x.shape[-1])


def check_same_rows(**tensors: Tensor) -> None:
    """Raise unless all tensors have as many rows as the first; names both."""
    (first, size), *others = ((name, len(x)) for name, x in tensors.items())
    for name, rows in others:
        if rows != size:
            raise InputError(f"{name} has {rows} rows and {first} {size}; row i of one belongs to row i of the other")


def check_values(name: str, x: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise unless labels, scores or margins `x` have one of these shapes and are finite; names the first bad row."""
    if tuple(x.shape) not in shapes:
        raise InputError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    bad = (~x.isfinite()).nonzero()
    if len(bad):
        where = ", ".join(map(str, bad[0].tolist()))
        raise InputError(f"{name}[{where}] is {x[tuple(bad[0])].item()}; leave that row out or compute it again")


def check_finite(values_L: Tensor, nesting: Nesting, tensors: Mapping[str, Tensor]) -> None:
    """Raise if a width's loss is NaN or infinite; names that width and the first bad row of its prefixes."""
    good = values_L.isfinite()
    if bool(good.all()):
        return
    level = int((~good).nonzero()[0])
    width, value = nesting.widths[level], float(values_L[level])
    for name, x in tensors.items():
        bad = (~x[..., :width].isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            raise InputError(
                f"the loss at width {width} is {value}: row {int(bad[0])} of {name} holds NaN or Inf; "
                "leave it out or encode it again"
            )
    raise InputError(
        f"the loss at width {width} is {value} though every row is finite: a number overflows; "
        "look at the loss's options and at the lengths of the rows"
    )


def per_width_option(
    name: str, given: Number, nesting: Nesting, dtype: torch.dtype, device: torch.device, *, positive: bool = True
) -> Tensor:
    """(L,) option in this dtype and on this device, keeping the gradient of a tensor; finite, perhaps > 0."""
    x = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
    levels = len(nesting)
    if x.ndim > 1 or (x.ndim == 1 and len(x) != levels):
        raise InputError(f"{name} must be one number or one per width ({levels}), got shape {tuple(x.shape)}")
    numbers = x.detach().reshape(-1)
    if not bool(numbers.isfinite().all()) or (positive and float(numbers.min()) <= 0):
        raise InputError(f"{name} must be finite{' and above 0' if positive else ''}, got {x.detach().tolist()}")
    return x.to(device=device, dtype=dtype).expand(levels)
