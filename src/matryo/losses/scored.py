"""Losses on scored pairs: a pair of a higher score should be the more similar one, at every width."""

from typing import Any

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.checks import Number, check_embeddings, check_same_rows, check_values, per_width_option
from matryo.losses.widths import over_widths, wide_type


def nested_cosent(
    first_BD: Tensor,
    second_BD: Tensor,
    scores_B: Tensor,
    *,
    nesting: Nesting,
    scale: Number = 20.0,
    per_width: bool = False,
) -> Any:
    """Nested CoSENT: sum over widths of c_d * log(1 + sum over scores_i > scores_j of exp(scale_d (cos_j - cos_i))).

    cos_i is the cosine of the prefixes of pair i. Only the order of the scores counts, not their values. Huang et al.
    2024 (CoSENT, doi 10.1109/TASLP.2024.3402087), nested as in arXiv 2205.13147, equation 1. Sorted by score, the inner
    sum is one running log-sum-exp, so B pairs take O(B log B) and never B x B.

    Args:
        first_BD, second_BD: (B, D), any row lengths; a row whose prefix is zero has cosine 0 at that width.
        scores_B: (B,) numbers, higher for more alike; at least two must differ. They get no gradient.
        nesting: widths and weights; its last width must be D.
        scale: one for all widths, one per width, or a tensor of either shape that may require a gradient; above 0.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values).

    Raises:
        InputError: shapes, widths or scales that do not fit; scores all equal or not finite; NaN in a row.
    """
    check_embeddings("first", first_BD, nesting)
    check_embeddings("second", second_BD, nesting)
    check_same_rows(first=first_BD, second=second_BD)
    order, above = _order(scores_B, first_BD)
    sharpness = per_width_option("scale", scale, nesting, wide_type(first_BD, second_BD), first_BD.device)

    def cosent(level: int, first: Tensor, second: Tensor) -> Tensor:
        return _ranking((first * second).sum(1)[order] * sharpness[level], above)

    return over_widths(cosent, nesting, {"first": first_BD, "second": second_BD}, per_width)


def nested_angle(
    first_BD: Tensor,
    second_BD: Tensor,
    scores_B: Tensor,
    *,
    nesting: Nesting,
    scale: Number = 20.0,
    per_width: bool = False,
) -> Any:
    """Nested AnglE: CoSENT with the angle between complex vectors in the place of the cosine.

    A prefix of width d is read as d/2 complex numbers, its first half the real parts and its second half the imaginary
    parts, so every width must be even. With z and w the unit prefixes, the similarity is |Re s + Im s|, where s is the
    sum of z_k * conj(w_k). AnglE (arXiv 2309.12871), section 3, the angle objective, as its authors' code and
    sentence-transformers compute it. Which dimensions form a complex number changes with the width: each width has its
    own pairing, and the loss at the full width is the un-nested one. The paper adds this term to CoSENT and InfoNCE;
    add `nested_cosent` and `nested_info_nce` for that.

    Args:
        first_BD, second_BD, scores_B, nesting, scale, per_width: as for `nested_cosent`.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values).

    Raises:
        InputError: as for `nested_cosent`; an odd width.
    """
    check_embeddings("first", first_BD, nesting)
    check_embeddings("second", second_BD, nesting)
    check_same_rows(first=first_BD, second=second_BD)
    odd = [width for width in nesting.widths if width % 2]
    if odd:
        raise InputError(
            f"AnglE splits a prefix into a real and an imaginary half, so widths must be even, got {odd[0]}; "
            f"use {odd[0] + 1} or the CoSENT loss"
        )
    order, above = _order(scores_B, first_BD)
    sharpness = per_width_option("scale", scale, nesting, wide_type(first_BD, second_BD), first_BD.device)

    def angle(level: int, first: Tensor, second: Tensor) -> Tensor:
        (a, b), (c, d) = first.chunk(2, dim=1), second.chunk(2, dim=1)
        similarity = (a * c + b * d + b * c - a * d).sum(1).abs()
        return _ranking(similarity[order] * sharpness[level], above)

    return over_widths(angle, nesting, {"first": first_BD, "second": second_BD}, per_width)


def _order(scores: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs by rising score, and for each the place where higher scores begin (B where there are none)."""
    check_values("scores", scores, (len(like),))
    # Comparing is exact in any type, but not every device sorts the short ones.
    wide = scores.float() if scores.element_size() < 4 else scores
    ranked, order = wide.detach().to(like.device).sort()
    if len(ranked) < 2 or bool(ranked[0] == ranked[-1]):
        raise InputError(
            f"all {len(ranked)} scores are {ranked[0].item()}, so there is no order to learn; "
            "a batch needs at least two pairs of different score"
        )
    return order, torch.searchsorted(ranked, ranked, right=True)


def _ranking(similarities: Tensor, above: Tensor) -> Tensor:
    """log(1 + sum over pairs of exp(lower-scored - higher-scored)) of similarities that come by rising score."""
    # From each place on: the log-sum of exp(-similarity); one step past the end the sum is empty.
    higher = (-similarities).flip(0).logcumsumexp(0).flip(0)
    higher = torch.cat([higher, higher.new_full((1,), -torch.inf)])
    return torch.cat([similarities.new_zeros(1), similarities + higher[above]]).logsumexp(0)
