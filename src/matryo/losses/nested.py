"""The readable definition of nesting: the sum over widths. Every fast loss of this room equals it and is tested so."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting, truncate


def nested(loss: Callable[..., Tensor], nesting: Nesting) -> Callable[..., Tensor]:
    """Turn any loss on embeddings into its nested form: sum over widths d of c_d * loss(prefixes of width d).

    Matryoshka Representation Learning (arXiv 2205.13147), equation 1. Every positional argument that is a floating
    tensor of shape (..., D) with two or more dimensions is an embedding and is cut and renormalised; labels, scores and
    keyword arguments pass through as they are.

    Args:
        loss: tensors in, scalar out.
        nesting: its last width must be the embeddings' D.

    Returns:
        A function with the arguments of `loss`, plus `per_width=False`; with True it returns (total, values), where
        values is a detached (L,) tensor of the unweighted loss at each width, for logging.

    Raises:
        InputError: no argument of the call is an embedding of width D.
    """

    def nested_loss(*args: Any, per_width: bool = False, **kwargs: Any) -> Any:
        is_embedding = [
            isinstance(a, Tensor) and a.is_floating_point() and a.ndim >= 2 and a.shape[-1] == nesting.D for a in args
        ]
        if not any(is_embedding):
            shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
            raise InputError(f"no positional argument is an embedding of width {nesting.D}; got tensors of {shapes}")
        values = [
            loss(*(truncate(a, width) if e else a for a, e in zip(args, is_embedding, strict=True)), **kwargs)
            for width in nesting.widths
        ]
        total = torch.stack([weight * value for weight, value in zip(nesting.weights, values, strict=True)]).sum()
        return (total, torch.stack(values).detach()) if per_width else total

    return nested_loss
