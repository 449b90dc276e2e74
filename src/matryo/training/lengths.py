"""Texts of like length together: a batch padded to its longest text is mostly padding where lengths differ.

Rows of a sentence encoder do not look at each other and padding is masked, so rows may be embedded in any order and
company: value and gradient stay the same, up to rounding, and what dropout draws.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features = dict[str, Any]
CALL = {"cpu": 128}
"""Tokens whose time a call of the model costs beside its rows, forward and backward (measured with six layers)."""
OTHER_CALL = 2048
"""The same on an accelerator, which small calls leave idle (not measured)."""


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
    """Parts of rows that `by_length` sorted, each trimmed to its longest: those that together cost the least."""
    mask: Tensor = features["attention_mask"]
    cost = CALL.get(mask.device.type, OTHER_CALL)
    for begin, end in cheapest_parts(mask.sum(1).cpu().numpy(), cost):
        rows = slice(begin, end)
        part = {name: x[rows] if isinstance(x, Tensor) else x for name, x in features.items()}
        yield trimmed(part)


def cheapest_parts(lengths: NDArray[np.int64], call: int) -> list[tuple[int, int]]:
    """Where to cut rows sorted by falling length, so that padded tokens plus `call` for every part are fewest.

    Shortest path over the places of cuts: O(B^2) for B rows.
    """
    count = len(lengths)
    begins = np.arange(count)
    least, begin_of = np.zeros(count + 1, dtype=np.int64), np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        costs = least[:end] + (end - begins[:end]) * lengths[:end]
        begin_of[end] = costs.argmin()
        least[end] = costs[begin_of[end]] + call
    parts = []
    end = count
    while end:
        begin = int(begin_of[end])
        parts.append((begin, end))
        end = begin
    return parts[::-1]


def embed_alike(run: Callable[[Features], Any], features: Features) -> Tensor:
    """`run(features)["sentence_embedding"]`, by parts of like length."""
    ordered, where = by_length(features)
    if where is None:
        whole: Tensor = run(features)["sentence_embedding"]
        return whole
    return torch.cat([run(part)["sentence_embedding"] for part in alike(ordered)])[where]
