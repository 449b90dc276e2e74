"""What nested losses share: the loop over widths, and the loop over chunks of rows for losses of B x N pairs.

Letters: B rows, N columns, R rows of a chunk, D full width, L widths.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting, truncate
from matryo.losses.checks import check_finite

BUFFER_SCORES = 4 << 20
"""Scores that the L logit matrices of one chunk hold together: 16 MB of float32, a few times that in its graph."""


def wide_type(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors has it."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def over_widths(
    loss: Callable[..., Tensor], nesting: Nesting, embeddings: Mapping[str, Tensor], per_width: bool
) -> Any:
    """The sum over widths of c_d * loss(level, *prefixes), in float32 or wider with autocast off; a NaN is named."""
    dtype = wide_type(*embeddings.values())
    wide = [x.to(dtype) for x in embeddings.values()]
    with torch.autocast(wide[0].device.type, enabled=False):
        values = torch.stack(
            [loss(level, *(truncate(x, width) for x in wide)) for level, width in enumerate(nesting.widths)]
        )
        check_finite(values.detach(), nesting, embeddings)
        total = (values.new_tensor(nesting.weights) * values).sum()
    return (total, values.detach()) if per_width else total


def over_chunks(
    part: Callable[..., Tensor], nesting: Nesting, *, by_row: Sequence[Tensor], shared: Sequence[Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """The weighted sum, and the detached (L,) values, of the sum over chunks of part(rows, *by_row[rows], *shared).

    Each chunk's gradient is formed right after its value, while its graph is there, and then the graph is dropped:
    nothing of size B x N outlives a chunk. Autocast is off inside. Differentiable once.
    """
    setting = (part, nesting.weights, len(by_row), chunk)
    with torch.autocast(by_row[0].device.type, enabled=False):
        total, values = _OverChunks.apply(setting, *by_row, *shared)  # type: ignore[no-untyped-call]
    return total, values


class _OverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: Any, *tensors: Tensor) -> Any:
        part, weights, count, chunk = setting
        needs = ctx.needs_input_grad[1:]
        gradients = [torch.zeros_like(x) if need else None for x, need in zip(tensors[:count], needs, strict=False)]
        shared = [x.detach().requires_grad_(need) for x, need in zip(tensors[count:], needs[count:], strict=True)]
        values = tensors[0].new_zeros(len(weights))
        scale = values.new_tensor(weights)
        for start in range(0, len(tensors[0]), chunk):
            rows = slice(start, min(start + chunk, len(tensors[0])))
            own = [x[rows].detach().requires_grad_(need) for x, need in zip(tensors[:count], needs, strict=False)]
            with torch.set_grad_enabled(any(needs)):
                levels = part(rows, *own, *shared)
                values += levels.detach()
                if any(needs):
                    (scale * levels).sum().backward()
            for leaf, gradient in zip(own, gradients, strict=False):
                if gradient is not None and leaf.grad is not None:
                    gradient[rows] = leaf.grad
        ctx.mark_non_differentiable(values)
        ctx.save_for_backward(*gradients, *(leaf.grad for leaf in shared))
        return (scale * values).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _values: Tensor) -> Any:
        return None, *(None if gradient is None else gradient * upstream for gradient in ctx.saved_tensors)


def chunk_rows(columns: int, nesting: Nesting, chunk: int | None = None) -> int:
    """How many rows are worked on at a time against so many columns."""
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1 row, got {chunk}")
    return chunk or max(1, BUFFER_SCORES // (columns * len(nesting)))


def prefix_products(rows_RD: Tensor, columns_ND: Tensor, nesting: Nesting) -> Iterator[Tensor]:
    """(R, N) products of the un-normalised prefixes, width by width; together one product of full width.

    Backwards the same holds: autograd sends the gradient of a width into the running sum below it.
    """
    gram: Tensor | None = None
    for a, b in zip(_split(rows_RD, nesting), _split(columns_ND, nesting), strict=True):
        gram = a @ b.T if gram is None else torch.addmm(gram, a, b.T)
        yield gram


def inverse_lengths(x: Tensor, nesting: Nesting) -> Tensor:
    """(rows, L) 1 / length of every prefix, 0 for a zero prefix: the blocks' squares, added up."""
    squares = torch.stack([block.square().sum(1) for block in _split(x, nesting)], dim=1).cumsum(1)
    return torch.where(squares > 0, squares, 1).rsqrt() * (squares > 0)


def _split(x: Tensor, nesting: Nesting) -> tuple[Tensor, ...]:
    """The block of columns that each width adds. One split, not L slices: its gradient is one concatenation."""
    return torch.split_with_sizes(x, [block.stop - block.start for block in nesting.blocks], dim=1)
