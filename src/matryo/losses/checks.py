"""Checks the losses share. Each raises before anything has changed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting

Number = float | Sequence[float] | Tensor
"""An option of a loss: one for all widths, one per width, or a tensor of either shape that may require a gradient."""


def check_embeddings(name: str, x: Tensor, nesting: Nesting, *, ndim: int = 2) -> None:
    """Raise unless `x` is a floating (B, D), or (B, K, D), tensor of at least one row whose D ends the nesting."""
    if x.ndim != ndim or not x.is_floating_point():
        shape = f"(B, {nesting.D})" if ndim == 2 else f"(B, K, {nesting.D})"
        raise InputError(f"{name} must be a {shape} floating tensor, got {tuple(x.shape)} of {x.dtype}")
    nesting.check(x.shape[-1])
    if len(x) == 0:
        raise InputError(f"{name}: a batch needs at least one row, got none")


def check_labels(labels: Tensor, size: int) -> None:
    """Raise unless `labels` holds one integer for each of `size` rows."""
    if labels.shape != (size,):
        raise InputError(f"labels must be ({size},), one for each row, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels must be integers, got {labels.dtype}; convert them with labels.long()")


def check_positives(labels: Tensor) -> None:
    """Raise unless some label occurs twice: a loss on pairs of one class has nothing to pull together otherwise."""
    if len(labels) == 1:
        raise InputError("a batch of one row has no pairs; use batches of at least two rows (drop the last one)")
    if int(torch.unique(labels, return_counts=True)[1].max()) < 2:
        raise InputError(
            f"all {len(labels)} labels of the batch differ, so no row has a positive; "
            "sample batches with at least two rows of a class"
        )


def check_finite(values: Tensor, nesting: Nesting, rows: Mapping[str, Tensor]) -> None:
    """Raise if a width's loss is NaN or infinite, naming the first such width and the first bad row.

    Args:
        values: (L,) unweighted loss of each width.
        nesting: the widths.
        rows: the loss' inputs by name, each (rows, ..., D); the first row not finite within the width is named.
    """
    finite = torch.isfinite(values.detach())
    if bool(finite.all()):
        return
    level = int((~finite).nonzero()[0])
    start = f"the loss at width {nesting.widths[level]} is {values[level].item()}"
    for name, x in rows.items():
        bad = (~torch.isfinite(x.detach()[..., : nesting.widths[level]])).flatten(1).any(1).nonzero()
        if len(bad):
            raise InputError(f"{start}: row {int(bad[0])} of {name} holds NaN or Inf; look at what made that row")
    raise InputError(
        f"{start} though every input is finite: the numbers are too large for {values.dtype}; "
        "lower the learning rate or scale the inputs down"
    )


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
