"""Distillation at every width: from a teacher's embeddings, or from a teacher's scores.

Embeddings are compared after both prefixes are renormalised, so a teacher's lengths are not read. Scores are read as
they are, whatever made them (dot products, a cross-encoder): only the student's side is a cosine, times a scale.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.checks import (
    Number,
    check_embeddings,
    check_finite,
    check_same_rows,
    check_values,
    per_width_option,
)
from matryo.losses.widths import (
    chunk_rows,
    inverse_lengths,
    over_chunks,
    over_widths,
    prefix_products,
    wide_type,
)

Kind = Literal["cosine", "mse", "similarity", "neighbours", "kl"]
KINDS = ("cosine", "mse", "similarity", "neighbours", "kl")
PAIRS = ("similarity", "neighbours")
"""Kinds that compare rows with each other, so that the teacher may have other dimensions."""
OF_ITSELF = -1e4
"""A logit whose probability is 0 in float32 and in float64, but whose product with 0 is."""
TEMPERATURES = {"kl": 0.3, "neighbours": 0.05}


def nested_distill(
    student_BD: Tensor,
    teacher_BE: Tensor,
    *,
    nesting: Nesting,
    kind: Kind = "cosine",
    teacher_nesting: Nesting | None = None,
    temperature: float | None = None,
    chunk: int | None = None,
    per_width: bool = False,
) -> Any:
    """Nested distillation from embeddings: sum over widths of c_d times one of, at width d,

    - "cosine": the mean over rows of 1 - cos(student prefix, teacher prefix);
    - "mse": the mean over rows of the squared distance of the two unit prefixes. (torch's `mse_loss` divides this by d,
      which would make each width weigh less than the one before.) On rows that are not zero it is twice "cosine";
    - "similarity": the mean over the B x B pairs of rows of (student cosine - teacher cosine)^2, which needs no common
      dimensions: similarity-preserving distillation (arXiv 1907.09682) with cosines;
    - "neighbours": the mean over rows of KL(teacher, student), each the softmax over the other rows of the batch of
      cosine / temperature: who is near whom (similarity distributions as in SEED, arXiv 2101.04731). Cosines of short
      prefixes spread wider, so the student's temperature is the teacher's times the ratio of their spreads (standard
      deviations in the batch, without gradient): a prefix is not to shrink its cosines but to order them. A model that
      is its own teacher, whole, learns to say with its prefixes what it says with all it has, from texts alone;
    - "kl": the mean over rows of KL(softmax(teacher prefix / temperature), softmax(student prefix / temperature)), the
      softmax over the d dimensions of the unit prefix: how 2D Matryoshka aligns layers (arXiv 2402.14776).

    Which prefix of the teacher: without `teacher_nesting`, the one of the same width if E = D, else the whole teacher
    at every width, which only "similarity" and "neighbours" can compare; "neighbours" takes the whole one always. With
    it, the prefixes of its widths, one for each of the student's in order; all other kinds need the same widths. Every
    prefix is renormalised. A student equal to its teacher has loss 0 at every width where it meets the same prefix.
    The teacher gets no gradient.

    Args:
        student_BD: (B, D), any row lengths; a zero prefix counts as the zero vector.
        teacher_BE: (B, E) of the same inputs, any row lengths.
        nesting: widths and weights; its last width must be D.
        kind: what is compared.
        teacher_nesting: L widths inside 1..E; its weights are not read. `nesting` itself for a longer nested teacher.
        temperature: of "kl" (0.3 if not given) and of "neighbours" (0.05); above 0.
        chunk: rows worked on at a time by "similarity" and "neighbours"; chosen from B and L by default. Does not
            change the result.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values). Differentiable once.

    Raises:
        InputError: shapes, widths or kinds that do not fit; a teacher of other rows; NaN in a row; one row only for
            "similarity" and "neighbours".
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    warmth = TEMPERATURES.get(kind, 1.0) if temperature is None else temperature
    if not 0 < warmth < math.inf:
        raise InputError(f"temperature must be finite and above 0, got {temperature}")
    check_embeddings("student", student_BD, nesting)
    taught = _teacher_widths(teacher_BE, nesting, kind, teacher_nesting)
    check_same_rows(student=student_BD, teacher=teacher_BE)
    embeddings = {"student": student_BD, "teacher": teacher_BE.detach()}
    if kind in PAIRS:
        return _pairs(embeddings, nesting, taught, warmth if kind == "neighbours" else None, chunk, per_width)

    def compare(_level: int, student: Tensor, teacher: Tensor) -> Tensor:
        if kind == "cosine":
            return (1 - (student * teacher).sum(1)).mean()
        if kind == "kl":
            own, taught = ((x / warmth).log_softmax(1) for x in (student, teacher))
            return F.kl_div(own, taught, reduction="batchmean", log_target=True)
        return (student - teacher).square().sum(1).mean()

    return over_widths(compare, nesting, embeddings, per_width)


def nested_margin_mse(
    queries_BD: Tensor,
    positives_BD: Tensor,
    negatives_BD: Tensor,
    teacher_margins_B: Tensor,
    *,
    nesting: Nesting,
    scale: Number = 20.0,
    per_width: bool = False,
) -> Any:
    """Nested MarginMSE: sum over widths of c_d times the mean over rows of
    (scale_d (cos(q, p) - cos(q, n)) - margin)^2.

    Margin-MSE (arXiv 2010.02666), nested as in arXiv 2205.13147, equation 1. The teacher's margin is read as it is:
    the score of the positive minus that of the negative, dot products included. The student's score is scale * cosine
    and not a dot product, whose lengths a renormalised prefix does not keep and a cosine search would not see.

    Args:
        queries_BD, positives_BD, negatives_BD: (B, D), any row lengths; a row whose prefix is zero has cosine 0.
        teacher_margins_B: (B,), or (L, B) from a nested teacher with margins of its own at each width. No gradient.
        nesting: widths and weights; its last width must be D.
        scale: one for all widths, one per width, or a tensor of either shape that may require a gradient; above 0. Two
            cosines differ by at most 2, so a margin beyond 2 * scale is refused, unless the scale is being learned.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values).

    Raises:
        InputError: shapes, widths or scales that do not fit; margins not finite or out of reach; NaN in a row.
    """
    embeddings = {"queries": queries_BD, "positives": positives_BD, "negatives": negatives_BD}
    for name, x in embeddings.items():
        check_embeddings(name, x, nesting)
    check_same_rows(**embeddings)
    size, dtype, device = len(queries_BD), wide_type(*embeddings.values()), queries_BD.device
    check_values("teacher_margins", teacher_margins_B, (size,), (len(nesting), size))
    scales = per_width_option("scale", scale, nesting, dtype, device)
    targets = teacher_margins_B.detach().to(device, dtype).expand(len(nesting), size)
    if not scales.requires_grad:
        _check_reach(targets, scales, nesting)

    def margin_mse(level: int, queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        margins = (queries * (positives - negatives)).sum(1) * scales[level]
        return (margins - targets[level]).square().mean()

    return over_widths(margin_mse, nesting, embeddings, per_width)


def nested_kl(
    queries_BD: Tensor,
    candidates_BKD: Tensor,
    teacher_scores_BK: Tensor,
    *,
    nesting: Nesting,
    temperature: Number = 0.05,
    teacher_temperature: float = 1.0,
    per_width: bool = False,
) -> Any:
    """Nested KL distillation of scores: sum over widths of c_d times the mean over queries of KL(teacher, student).

    The teacher's distribution over a query's K candidates is softmax(scores / teacher_temperature), scores as they
    are; the student's at width d is softmax(cos / temperature_d). Hinton et al. 2015 (arXiv 1503.02531), section 2, on
    lists of candidates as in arXiv 2010.11386, without the factor temperature^2.

    Args:
        queries_BD: (B, D), any row lengths; a row whose prefix is zero has cosine 0 at that width.
        candidates_BKD: (B, K, D) with K >= 2, the candidates of each query.
        teacher_scores_BK: (B, K), or (L, B, K) from a nested teacher with scores of its own at each width. No gradient.
        nesting: widths and weights; its last width must be D.
        temperature: of the student; one for all widths, one per width, or a tensor of either shape that may require a
            gradient; above 0. An un-normalised student's dot product is not offered: see `nested_margin_mse`.
        teacher_temperature: above 0.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values).

    Raises:
        InputError: shapes, widths or temperatures that do not fit; scores not finite; one candidate; NaN in a row.
    """
    check_embeddings("queries", queries_BD, nesting)
    check_embeddings("candidates", candidates_BKD, nesting, ndim=3)
    check_same_rows(queries=queries_BD, candidates=candidates_BKD)
    shape, levels = tuple(candidates_BKD.shape[:2]), len(nesting)
    if shape[1] < 2:
        raise InputError("one candidate per query always has probability 1; give at least 2 candidates")
    check_values("teacher_scores", teacher_scores_BK, shape, (levels, *shape))
    dtype, device = wide_type(queries_BD, candidates_BKD), queries_BD.device
    temperatures = per_width_option("temperature", temperature, nesting, dtype, device)
    warmth = per_width_option("teacher_temperature", teacher_temperature, nesting, dtype, device)[0]
    targets = (teacher_scores_BK.detach().to(device, dtype) / warmth).log_softmax(-1).expand(levels, *shape)

    def kl(level: int, queries: Tensor, candidates: Tensor) -> Tensor:
        scores = torch.bmm(candidates, queries[:, :, None])[:, :, 0] / temperatures[level]
        return F.kl_div(scores.log_softmax(1), targets[level], reduction="batchmean", log_target=True)

    return over_widths(kl, nesting, {"queries": queries_BD, "candidates": candidates_BKD}, per_width)


def _teacher_widths(teacher: Tensor, nesting: Nesting, kind: Kind, given: Nesting | None) -> Nesting:
    """The teacher's width at each of the student's, or its full width alone: the whole teacher at every width."""
    if teacher.ndim != 2 or not teacher.is_floating_point() or 0 in teacher.shape:
        raise InputError(f"teacher must be a (B, E) floating tensor, got {tuple(teacher.shape)} of {teacher.dtype}")
    full = teacher.shape[1]
    if given is None:
        if full != nesting.D and kind not in PAIRS:
            raise InputError(
                f"{kind} compares equal dimensions, but the student has {nesting.D} and the teacher {full}; use "
                "kind='similarity' or 'neighbours'"
                + (", or teacher_nesting=nesting if the teacher is nested" * (full > nesting.D))
            )
        return nesting if full == nesting.D and kind != "neighbours" else Nesting([full])
    if len(given) != len(nesting) or full < given.D:
        raise InputError(
            f"teacher_nesting must have one width for each of the student's {len(nesting)}, inside 1..{full}, "
            f"got {list(given.widths)}"
        )
    if kind not in PAIRS and given.widths != nesting.widths:
        raise InputError(
            f"{kind} compares equal dimensions, so teacher_nesting must have the student's widths "
            f"{list(nesting.widths)}, got {list(given.widths)}; use kind='similarity' or 'neighbours' for others"
        )
    return given


def _pairs(
    embeddings: dict[str, Tensor],
    nesting: Nesting,
    taught: Nesting,
    temperature: float | None,
    chunk: int | None,
    per_width: bool,
) -> Any:
    """In-batch cosines against in-batch cosines, in chunks of rows; every product is shared by all widths.

    Args:
        temperature: of the softmax over the other rows; without one the cosines are compared as they are.
    """
    size = len(embeddings["student"])
    if size < 2:
        raise InputError("a batch of one has no pairs of rows to compare; give at least 2 rows")
    check_values("teacher", embeddings["teacher"], tuple(embeddings["teacher"].shape))
    rows = chunk_rows(size, nesting, chunk)
    dtype = wide_type(*embeddings.values())
    student, teacher = embeddings["student"].to(dtype), embeddings["teacher"][:, : taught.D].to(dtype)
    both = (student, inverse_lengths(student, nesting), teacher, inverse_lengths(teacher, taught))
    if temperature is not None:
        with torch.autocast(student.device.type, enabled=False), torch.no_grad():
            aims, own = _spreads(*both[2:], taught), _spreads(*both[:2], nesting)
        # Cosines that are all equal have nothing to be scaled to.
        warm = [temperature * (a / b if a > 0 and b > 0 else 1.0) for a, b in zip(own, aims * len(own), strict=False)]

    def part(chunk: slice, *tensors: Tensor) -> Tensor:
        s, s_scale, t, t_scale, S, S_scale, T, T_scale = tensors
        targets: Iterable[Tensor] = _cosines(t, t_scale, T, T_scale, taught)
        cosines = _cosines(s, s_scale, S, S_scale, nesting)
        if temperature is not None:
            itself = torch.zeros(len(s), size, dtype=torch.bool, device=s.device)
            itself[:, chunk].fill_diagonal_(True)
            targets = _told(targets, repeat(temperature), itself)
            cosines = _told(cosines, warm, itself)
        if len(taught) == 1:
            targets = repeat(next(iter(targets)), len(nesting))
        if temperature is None:
            return torch.stack([(a - b).square().sum() for a, b in zip(cosines, targets, strict=False)]) / size**2
        terms = [F.kl_div(a, b, reduction="sum", log_target=True) for a, b in zip(cosines, targets, strict=False)]
        return torch.stack(terms) / size

    total, values = over_chunks(part, nesting, by_row=both, shared=both, chunk=rows)
    check_finite(values, nesting, {"student": embeddings["student"]})
    return (total, values) if per_width else total


def _spreads(x: Tensor, scale: Tensor, nesting: Nesting) -> list[float]:
    """The standard deviation of the cosines of different rows at each width, by sums of squares of d x d products."""
    found, pairs = [], len(x) * (len(x) - 1)
    for level, width in enumerate(nesting.widths):
        unit = x[:, :width] * scale[:, level, None]
        itself = unit.square().sum(1)
        mean = (unit.sum(0).square().sum() - itself.sum()) / pairs
        square = ((unit.T @ unit).square().sum() - itself.square().sum()) / pairs
        found.append(float((square - mean * mean).clamp_min(0).sqrt()))
    return found


def _told(cosines: Iterable[Tensor], temperatures: Iterable[float], itself_RB: Tensor) -> Iterator[Tensor]:
    """Logarithms of the softmax over the other rows, (R, B) for each width. A row's share of itself is next to none,
    not none: KL would make NaN of its logarithm."""
    for cosine, temperature in zip(cosines, temperatures, strict=False):
        yield (cosine / temperature).masked_fill(itself_RB, OF_ITSELF).log_softmax(1)


def _cosines(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, nesting: Nesting) -> Iterator[Tensor]:
    for level, gram in enumerate(prefix_products(a, b, nesting)):
        yield gram * a_scale[:, level, None] * b_scale[:, level]


def _check_reach(margins_LB: Tensor, scales: Tensor, nesting: Nesting) -> None:
    """Refuse a margin that no two cosines can have."""
    beyond = (margins_LB.abs() > 2 * scales[:, None]).nonzero()
    if len(beyond):
        level, row = beyond[0].tolist()
        margin = float(margins_LB[level, row])
        raise InputError(
            f"teacher_margins has {margin:g} in row {row}, but at width {nesting.widths[level]} scale * (cos - cos) "
            f"stays within +-{2 * float(scales[level]):g}; use a scale of at least {abs(margin) / 2:g}, or learn it"
        )
