"""Multi-similarity: pairs weighted and mined by three similarities, at every width. Letters: B rows, D full width."""

import math
from typing import Any

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.checks import check_embeddings, check_labels, check_positives
from matryo.losses.widths import over_widths


def nested_multi_similarity(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    *,
    nesting: Nesting,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
    per_width: bool = False,
) -> Any:
    """Nested multi-similarity loss (arXiv 1904.06627), equation 15; pairs mined at each width (equations 11 and 12).

    With S the cosines of a width, an anchor's negative is kept if S > its lowest positive - epsilon, and a positive if
    S < its highest negative + epsilon; what is hard at 8 dimensions need not be at 768. An anchor's loss is
    log(1 + sum over kept positives of exp(-alpha (S - base))) / alpha
    + log(1 + sum over kept negatives of exp(beta (S - base))) / beta; the loss of a width is its mean over all anchors,
    those without a kept pair counting 0. An anchor without a positive keeps no pair. Mining passes no gradient.

    Args:
        embeddings_BD: (B, D) floating, any row lengths.
        labels_B: (B,) integer classes; at least two classes, one of them with two rows.
        nesting: widths and weights; its last width must be D.
        alpha, beta: sharpness of the positive and the negative part, above 0.
        base: the cosine at which a pair counts half (lambda in the paper).
        epsilon: margin of the mining; 2 or more keeps every pair of an anchor that has a positive.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values). Autocast is off inside.

    Raises:
        InputError: shapes or options do not fit, a batch of one row, one class only, no class with two rows, or a loss
            is NaN or infinite (names the width and the first bad row).
    """
    check_embeddings("embeddings", embeddings_BD, nesting)
    check_labels(labels_B, len(embeddings_BD))
    check_positives(labels_B)
    if bool((labels_B == labels_B[0]).all()):
        raise InputError(
            f"all {len(labels_B)} rows have label {int(labels_B[0])}, so there are no negatives; "
            "sample batches with at least two classes"
        )
    for name, value in {"alpha": alpha, "beta": beta}.items():
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name} must be finite and above 0, got {value}")
    for name, value in {"base": base, "epsilon": epsilon}.items():
        if not math.isfinite(value):
            raise InputError(f"{name} must be finite, got {value}")
    labels = labels_B.to(embeddings_BD.device)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)

    def one_width(_level: int, embeddings: Tensor) -> Tensor:
        cosines = embeddings @ embeddings.T
        seen = cosines.detach()
        lowest_positive = seen.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        highest_negative = seen.masked_fill(same, -torch.inf).amax(1, keepdim=True)
        # Written as "not at least" so that a NaN is kept and shows in the loss.
        far = positive & ~(seen >= highest_negative + epsilon)
        near = ~same & ~(seen <= lowest_positive - epsilon)
        pull = _soft_sum((base - cosines) * alpha, far) / alpha
        push = _soft_sum((cosines - base) * beta, near) / beta
        return (pull + push).mean()

    return over_widths(one_width, nesting, {"embeddings": embeddings_BD}, per_width)


def _soft_sum(logits: Tensor, kept: Tensor) -> Tensor:
    """(B,) log(1 + the sum over kept entries of a row of exp(logit)); 0 where none is kept."""
    one = logits.new_zeros(len(logits), 1)
    return torch.logsumexp(torch.cat([one, logits.masked_fill(~kept, -torch.inf)], 1), 1)
