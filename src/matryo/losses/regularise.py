"""Regularisers: losses of several terms, to be nested and added to a main loss. Letters: B rows, D width."""

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.losses.widths import wide_type


def global_orthogonal(anchors_BD: Tensor, others_BD: Tensor) -> dict[str, Tensor]:
    """Global orthogonal regularisation (arXiv 1708.06320, section 3.3): spreads out what does not belong together.

    Over all pairs (i, j != i) of cosines s = a_i . o_j: the mean term is (mean of s)^2, and the second-moment term is
    max(0, mean of s^2 - 1/D). Both are 0 in expectation for independent directions drawn uniformly from the sphere.

        nested(global_orthogonal, nesting)(anchors_BD, positives_BD)  # non-matching pairs, as in the paper
        nested(global_orthogonal, nesting)(anchors_BD, anchors_BD)    # one column, as sentence-transformers does

    `nested` adds up the terms and takes 1/D at each width.

    Args:
        anchors_BD: (B, D) floating, rows of unit length, as `nested` hands them over.
        others_BD: (B, D) likewise; row i belongs to anchor i, and that pair is left out.

    Returns:
        {"mean": scalar, "second_moment": scalar} in float32 (float64 for float64 input), unweighted.

    Raises:
        InputError: the shapes differ, or one row only, which leaves no pair.
    """
    if anchors_BD.ndim != 2 or anchors_BD.shape != others_BD.shape:
        raise InputError(
            f"anchors and others must be two (B, D) tensors, got {tuple(anchors_BD.shape)} and {tuple(others_BD.shape)}"
        )
    size, width = anchors_BD.shape
    if size < 2:
        raise InputError(f"global_orthogonal needs at least two rows, got {size}; drop the last, uneven batch")
    with torch.autocast(anchors_BD.device.type, enabled=False):
        dtype = wide_type(anchors_BD, others_BD)
        anchors, others = anchors_BD.to(dtype), others_BD.to(dtype)
        cosines = (anchors @ others.T).masked_fill(torch.eye(size, dtype=torch.bool, device=anchors.device), 0)
        pairs = size * (size - 1)
        mean = (cosines.sum() / pairs).square()
        second_moment = torch.relu(cosines.square().sum() / pairs - 1 / width)
    return {"mean": mean, "second_moment": second_moment}
