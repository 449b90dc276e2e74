"""Losses with a margin. Rows are unit vectors at every width, so a margin above 2 could never be met and is refused."""

from typing import Any, Literal

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.checks import check_embeddings, check_same_rows, check_values
from matryo.losses.widths import over_widths

Metric = Literal["cosine", "euclidean"]

FARTHEST = 2.0
"""The largest distance of two unit vectors: 1 - cos at opposite directions, and the diameter of the sphere."""
TRIPLET_MARGINS: dict[str, float] = {"cosine": 0.2, "euclidean": 0.3}
"""A fifth of the distance of unrelated unit vectors, which is 1 and the root of 2."""


def nested_triplet(
    anchors_BD: Tensor,
    positives_BD: Tensor,
    negatives_BD: Tensor,
    *,
    nesting: Nesting,
    margin: float | None = None,
    metric: Metric = "cosine",
    per_width: bool = False,
) -> Any:
    """Nested triplet loss: sum over widths of c_d times the mean over rows of max(0, d(a, p) - d(a, n) + margin).

    FaceNet (arXiv 1503.03832), section 3.1, with the distance between renormalised prefixes: 1 - cosine, or the
    Euclidean distance (not squared).

    Args:
        anchors_BD, positives_BD, negatives_BD: (B, D), any row lengths; a zero prefix counts as the zero vector.
        nesting: widths and weights; its last width must be D.
        margin: above 0 and at most 2, because distances lie in 0..2; by default 0.2 for cosine and 0.3 for Euclidean.
        metric: "cosine" or "euclidean". Equal Euclidean rows pass no gradient through their distance.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values).

    Raises:
        InputError: shapes or widths that do not fit; a margin unit vectors cannot meet; NaN in a row.
    """
    embeddings = {"anchors": anchors_BD, "positives": positives_BD, "negatives": negatives_BD}
    for name, x in embeddings.items():
        check_embeddings(name, x, nesting)
    check_same_rows(**embeddings)
    gap = _check_margin(TRIPLET_MARGINS.get(metric, 0.0) if margin is None else margin, metric)

    def triplet(_level: int, anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        return (_distance(anchors, positives, metric) - _distance(anchors, negatives, metric) + gap).relu().mean()

    return over_widths(triplet, nesting, embeddings, per_width)


def nested_online_contrastive(
    first_BD: Tensor,
    second_BD: Tensor,
    labels_B: Tensor,
    *,
    nesting: Nesting,
    margin: float = 0.5,
    metric: Metric = "cosine",
    per_width: bool = False,
) -> Any:
    """Nested contrastive loss on the hard pairs of the batch, mined again at every width.

    At each width: the sum of d^2 over the hard positives and of max(0, margin - d)^2 over the hard negatives. A
    positive is hard if it is farther than the closest negative, a negative if it is closer than the farthest positive;
    in a batch of one label the mean distance takes the place of the other side. Contrastive loss of Hadsell et al.
    2006, equation 4, with the mining and the sum (not mean) of sentence-transformers' OnlineContrastiveLoss.

    Args:
        first_BD, second_BD: (B, D) with B >= 2, any row lengths; a zero prefix counts as the zero vector.
        labels_B: (B,) 1 for a pair that belongs together, 0 for one that does not.
        nesting: widths and weights; its last width must be D.
        margin: above 0 and at most 2, because the distances lie in 0..2.
        metric: "cosine" (1 - cosine) or "euclidean".
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values).

    Raises:
        InputError: shapes, widths or labels that do not fit; a margin unit vectors cannot meet; NaN in a row.
    """
    embeddings = {"first": first_BD, "second": second_BD}
    for name, x in embeddings.items():
        check_embeddings(name, x, nesting)
    check_same_rows(**embeddings)
    positive = _check_binary(labels_B, len(first_BD)).to(first_BD.device)
    gap = _check_margin(margin, metric)

    def contrastive(_level: int, first: Tensor, second: Tensor) -> Tensor:
        distances = _distance(first, second, metric)
        near, far = distances[positive], distances[~positive]
        # Every comparison with NaN is false: asked this way round, a bad row counts as hard and shows in the loss.
        hard_far = far[~(far >= (near.max() if len(near) else far.mean()))]
        hard_near = near[~(near <= (far.min() if len(far) else near.mean()))]
        return hard_near.square().sum() + (gap - hard_far).relu().square().sum()

    return over_widths(contrastive, nesting, embeddings, per_width)


def _distance(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    if metric == "cosine":
        return 1 - (a * b).sum(1)
    distances: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return distances


def _check_margin(margin: float, metric: str) -> float:
    if metric not in TRIPLET_MARGINS:
        raise InputError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    if not 0 < margin <= FARTHEST:
        raise InputError(
            f"margin must be above 0 and at most {FARTHEST:g}, got {margin}: {metric} distances of unit vectors lie in "
            f"0..{FARTHEST:g}, so the loss could never reach zero with a larger one; try {TRIPLET_MARGINS[metric]}"
        )
    return float(margin)


def _check_binary(labels: Tensor, size: int) -> Tensor:
    check_values("labels", labels, (size,))
    bad = ((labels != 0) & (labels != 1)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise InputError(f"labels must be 0 or 1, got {labels[row].item()} in row {row}")
    if size < 2:
        raise InputError("a batch of one has no hard pairs to mine; give at least 2 pairs")
    return labels == 1
