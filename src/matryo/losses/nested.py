"""The readable definition of nesting: the sum over widths. Every fast loss of this room equals it and is tested so."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting, truncate
from matryo.losses.checks import check_finite

Terms = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
"""What a loss may return: a scalar, or several that add up."""


def nested(loss: Callable[..., Terms], nesting: Nesting) -> Callable[..., Any]:
    """Turn any loss on embeddings into its nested form: sum over widths d of c_d * loss(prefixes of width d).

    Matryoshka Representation Learning (arXiv 2205.13147), equation 1. Every positional argument that is a floating
    tensor of shape (..., D) with two or more dimensions is an embedding and is cut and renormalised; labels, scores and
    keyword arguments pass through as they are.

    Args:
        loss: tensors in, scalar out. It may also return several scalars, as a mapping from names or as a tuple or list:
            the loss of a width is then their sum.
        nesting: its last width must be the embeddings' D.

    Returns:
        A function with the arguments of `loss`, plus `per_width=False`; with True it returns (total, values), where
        values is a detached (L,) tensor of the unweighted loss (the sum of its terms) at each width, for logging.

    Raises:
        InputError: no argument of the call is an embedding of width D, the loss returns something else than scalars, or
            it is NaN or infinite at some width (names the width and the first bad row).
    """

    def nested_loss(*args: Any, per_width: bool = False, **kwargs: Any) -> Any:
        is_embedding = [
            isinstance(a, Tensor) and a.is_floating_point() and a.ndim >= 2 and a.shape[-1] == nesting.D for a in args
        ]
        if not any(is_embedding):
            shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
            raise InputError(f"no positional argument is an embedding of width {nesting.D}; got tensors of {shapes}")
        values = [
            _total(loss(*(truncate(a, width) if e else a for a, e in zip(args, is_embedding, strict=True)), **kwargs))
            for width in nesting.widths
        ]
        embeddings = {_name(loss, n): a for n, (a, e) in enumerate(zip(args, is_embedding, strict=True)) if e}
        check_finite(torch.stack(values), nesting, embeddings)
        total = torch.stack([weight * value for weight, value in zip(nesting.weights, values, strict=True)]).sum()
        return (total, torch.stack(values).detach()) if per_width else total

    return nested_loss


def _name(loss: Callable[..., Any], place: int) -> str:
    """What `loss` calls its argument at this place."""
    try:
        return list(inspect.signature(loss).parameters)[place]
    except (TypeError, ValueError, IndexError):
        return f"argument {place + 1}"


def _total(terms: Terms) -> Tensor:
    """The sum of a loss' terms."""
    parts = [terms] if isinstance(terms, Tensor) else list(terms.values() if isinstance(terms, Mapping) else terms)
    if not parts or any(part.ndim != 0 for part in parts):
        raise InputError(
            "a loss must return a scalar, or a mapping, tuple or list of scalars, got shapes "
            f"{[tuple(part.shape) for part in parts]}; take its mean or sum"
        )
    return torch.stack(parts).sum()
