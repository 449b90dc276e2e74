"""Layers x widths: the loop over depths around a nested loss, and the alignment of every depth to the last layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from matryo.core.depths import DepthNesting
from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.distill import nested_distill

Values = dict[int, tuple[Nesting, Any]]
"""Depth -> its widths and the unweighted loss at each of them, detached."""


def over_depths(
    loss: Callable[[list[Tensor], Nesting], tuple[Tensor, Any]], columns_BKD: Sequence[Tensor], depths: DepthNesting
) -> tuple[Tensor, Values]:
    """The sum over depths of w_k (nested loss at depth k + align * distance to the last layer), for k below the last.

    2D Matryoshka (arXiv 2402.14776, section 3) over any nested loss. The last layer's loss is its own alone, and its
    vectors, as the target of the others, get no gradient from the alignment.

    Args:
        loss: columns of (B, d) embeddings and their nesting, whose last width is d, to (scalar, values per width).
        columns_BKD: each column's embeddings at the K depths of `depths`, in their order.
        depths: weights, widths and alignment.

    Returns:
        The scalar, and for each depth its nesting and the values that `loss` gave.

    Raises:
        InputError: columns of another number of depths; whatever the loss refuses, which names the depth.
    """
    for column in columns_BKD:
        if column.ndim != 3 or column.shape[1] != len(depths):
            raise InputError(f"columns must be (B, {len(depths)}, D), one for each depth, got {tuple(column.shape)}")
    total = torch.zeros((), device=columns_BKD[0].device)
    found: Values = {}
    for place, (depth, weight, nesting) in enumerate(zip(depths.depths, depths.weights, depths.nestings, strict=True)):
        own = [column[:, place, : nesting.D] for column in columns_BKD]
        try:
            value, values = loss(own, nesting)
            if place < len(depths) - 1 and depths.align:
                deepest = torch.cat([column[:, -1, : nesting.D] for column in columns_BKD])
                value = value + depths.align * nested_distill(
                    torch.cat(own), deepest, nesting=nesting, kind=depths.alignment, temperature=depths.temperature
                )
        except InputError as error:
            raise InputError(f"depth {depth}: {error}") from error
        found[depth] = (nesting, values)
        total = total + weight * value
    return total, found
