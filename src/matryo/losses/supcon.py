"""Supervised contrastive loss at every width. Letters: B rows, D full width."""

import math
from typing import Any

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.checks import check_embeddings, check_labels, check_positives
from matryo.losses.widths import over_widths, wide_type


def nested_supcon(
    embeddings_BD: Tensor, labels_B: Tensor, *, nesting: Nesting, temperature: float = 0.1, per_width: bool = False
) -> Any:
    """Nested supervised contrastive loss (arXiv 2004.11362), equation 2.

    The loss of an anchor is minus the mean, over the other rows of its class, of the log of their share in the softmax
    over all other rows of cosine / temperature. The loss of a width is the mean over anchors that have a positive (the
    paper sums; a mean does not grow with the batch). Rows without a positive still are negatives of the others. For two
    views of each image pass the 2N rows with each label twice; with labels all different that is SimCLR's loss.

    Args:
        embeddings_BD: (B, D) floating, any row lengths.
        labels_B: (B,) integer classes, one of them with two rows.
        nesting: widths and weights; its last width must be D.
        temperature: above 0.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values). Autocast is off inside.

    Raises:
        InputError: shapes or the temperature do not fit, a batch of one row, no class with two rows, or a loss is NaN
            or infinite (names the width and the first bad row).
    """
    check_embeddings("embeddings", embeddings_BD, nesting)
    check_labels(labels_B, len(embeddings_BD))
    check_positives(labels_B)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"temperature must be finite and above 0, got {temperature}")
    labels = labels_B.to(embeddings_BD.device)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & ~itself
    anchors = positive.any(1)
    positive = positive[anchors]
    share = positive.to(wide_type(embeddings_BD)) / positive.sum(1, keepdim=True)

    def one_width(_level: int, embeddings: Tensor) -> Tensor:
        logits = (embeddings[anchors] @ embeddings.T) / temperature
        log_sums = torch.logsumexp(logits.masked_fill(itself[anchors], -torch.inf), 1)
        return (log_sums - (share * logits).sum(1)).mean()

    return over_widths(one_width, nesting, {"embeddings": embeddings_BD}, per_width)
