"""Texts of like length together: a batch padded to its longest text is mostly padding where lengths differ.

Rows of a sentence encoder do not look at each other and padding is masked, so rows may be embedded in any order and
company: value and gradient stay the same, up to rounding, and what dropout draws.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Features = dict[str, Any]
LIKE = 0.75
"""A row at least this share of its company's longest is of like length."""
FEWEST = 16
"""Rows that are worth a call of the model."""


def by_length(features: Features) -> tuple[Features, Tensor | None]:
    """A column's rows, longest first, and where each of them went; unchanged and None where rows have no padding.

    Args:
        features: (B, T) `attention_mask` and tensors of B rows beside it; whatever is not a tensor stays as it is.
    """
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return features, None
    tensors = {name: x for name, x in features.items() if isinstance(x, Tensor)}
    if any(x.ndim == 0 or len(x) != len(mask) for x in tensors.values()):
        return features, None
    order = mask.sum(1).argsort(descending=True, stable=True)
    where = torch.empty_like(order)
    where[order] = torch.arange(len(order), device=order.device)
    return {**features, **{name: x[order] for name, x in tensors.items()}}, where


def trimmed(features: Features) -> Features:
    """The rows without the columns at the end that are padding in all of them.

    Padding on the left stays: positions may be counted from it.
    """
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return features
    used = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1
    whole = mask.shape[1]
    padded = {name: x for name, x in features.items() if isinstance(x, Tensor) and x.shape[:2] == mask.shape}
    return features if used == whole else {**features, **{name: x[:, :used] for name, x in padded.items()}}


def alike(features: Features) -> Iterator[Features]:
    """Parts of rows that `by_length` sorted, each of like length and trimmed to it."""
    mask: Tensor = features["attention_mask"]
    lengths: list[int] = mask.sum(1).tolist()
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths) and (end - begin < FEWEST or lengths[end] >= LIKE * lengths[begin]):
            continue
        rows = slice(begin, end)
        part = {name: x[rows] if isinstance(x, Tensor) else x for name, x in features.items()}
        yield trimmed(part)
        begin = end


def embed_alike(run: Callable[[Features], Any], features: Features) -> Tensor:
    """`run(features)["sentence_embedding"]`, by parts of like length."""
    ordered, where = by_length(features)
    if where is None:
        whole: Tensor = run(features)["sentence_embedding"]
        return whole
    return torch.cat([run(part)["sentence_embedding"] for part in alike(ordered)])[where]
