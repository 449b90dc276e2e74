"""The pairwise sigmoid loss at every width: each pair is its own yes-or-no question, no softmax over the batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.checks import Number, check_embeddings, check_finite, per_width_option
from matryo.losses.widths import chunk_rows, inverse_lengths, over_chunks, prefix_products, wide_type


def nested_sigmoid(
    anchors_BD: Tensor,
    candidates_ND: Tensor,
    *,
    nesting: Nesting,
    scale: Number = 10.0,
    bias: Number = -10.0,
    ignore: Tensor | None = None,
    group: Tensor | None = None,
    chunk: int | None = None,
    per_width: bool = False,
) -> Any:
    """Nested SigLIP: sum over widths of c_d / B times the sum over pairs of -log s(z_ij (scale_d cos_ij + bias_d)).

    s is the sigmoid; z_ij is 1 where candidate j belongs to anchor i and -1 elsewhere. SigLIP (arXiv 2303.15343),
    section 3.2 and algorithm 1, nested as in arXiv 2205.13147, equation 1. All widths share one running product, rows
    are taken in chunks, and each chunk's gradient is formed beside its value: nothing of size B x N is kept.

    Args:
        anchors_BD: (B, D), any row lengths; a row whose prefix is zero has cosine 0 with everything at that width.
        candidates_ND: (N, D) with N >= 2, the positives first (candidate i belongs to anchor i), then hard negatives.
        nesting: widths and weights; its last width must be D.
        scale, bias: one for all widths, one per width, or a tensor of either shape that may require a gradient;
            scale above 0. SigLIP starts at 10 and -10 and learns both, the scale by its logarithm: pass `t.exp()`.
        ignore: (B, N) bool; True leaves a pair out. An anchor's own positive is never left out.
        group: (B,) or (N,) integers, for the first B or all candidates, negative for none; other candidates of the
            anchor's group are left out (false negatives).
        chunk: anchor rows worked on at a time; chosen from N and L by default. Does not change the result.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values). Differentiable once.

    Raises:
        InputError: shapes, widths, masks, scales or biases that do not fit; one candidate only; NaN in a row.
    """
    _check(anchors_BD, candidates_ND, nesting, ignore, group)
    rows = chunk_rows(len(candidates_ND), nesting, chunk)
    dtype, device = wide_type(anchors_BD, candidates_ND), anchors_BD.device
    scales = per_width_option("scale", scale, nesting, dtype, device)
    biases = per_width_option("bias", bias, nesting, dtype, device, positive=False)
    anchors, candidates = anchors_BD.to(dtype), candidates_ND.to(dtype)
    size, groups = len(anchors), _whole_group(group, len(candidates), device)
    ignored = None if ignore is None else ignore.to(device)

    def part(rows: slice, a: Tensor, u_RL: Tensor, c: Tensor, v_NL: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
        mask = _left_out(rows, ignored, groups)
        values = []
        for level, gram in enumerate(prefix_products(a, c, nesting)):
            logits = gram * (scales[level] * u_RL[:, level, None]) * v_NL[:, level] + biases[level]
            # First as if every pair were a negative; a positive differs by its logit: -log s(x) = -log s(-x) - x.
            pairs = F.logsigmoid(-logits)
            if mask is not None:
                pairs = pairs.masked_fill(mask, 0)
            values.append(-(pairs.sum() + logits.diagonal(rows.start).sum()) / size)
        return torch.stack(values)

    total, values = over_chunks(
        part,
        nesting,
        by_row=(anchors, inverse_lengths(anchors, nesting)),
        shared=(candidates, inverse_lengths(candidates, nesting), scales, biases),
        chunk=rows,
    )
    check_finite(values, nesting, {"anchors": anchors_BD, "candidates": candidates_ND})
    return (total, values) if per_width else total


def _left_out(rows: slice, ignore: Tensor | None, groups: Tensor | None) -> Tensor | None:
    """(R, N) True where a pair is left out, or None."""
    mask: Tensor | None = None
    if groups is not None:
        own = groups[rows, None]
        mask = (own == groups) & (own >= 0)
    if ignore is not None:
        mask = ignore[rows].clone() if mask is None else mask | ignore[rows]
    if mask is not None:
        mask.diagonal(rows.start).fill_(False)
    return mask


def _whole_group(group: Tensor | None, count: int, device: torch.device) -> Tensor | None:
    """A group for every candidate: hard negatives without one get none."""
    return None if group is None else F.pad(group.to(device), (0, count - len(group)), value=-1)


def _check(anchors: Tensor, candidates: Tensor, nesting: Nesting, ignore: Tensor | None, group: Tensor | None) -> None:
    check_embeddings("anchors", anchors, nesting)
    check_embeddings("candidates", candidates, nesting)
    size, count = len(anchors), len(candidates)
    if count < size:
        raise InputError(f"{size} anchors need at least {size} candidates (the positives first), got {count}")
    if count < 2:
        raise InputError("one anchor with one candidate has no negative to tell from; give at least 2 candidates")
    if ignore is not None and (ignore.shape != (size, count) or ignore.dtype != torch.bool):
        raise InputError(f"ignore must be ({size}, {count}) bool, got {tuple(ignore.shape)} of {ignore.dtype}")
    if group is not None and (group.ndim != 1 or len(group) not in (size, count) or group.is_floating_point()):
        raise InputError(f"group must be ({size},) or ({count},) integers, got {tuple(group.shape)} of {group.dtype}")
