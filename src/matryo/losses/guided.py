"""False negatives masked by a guide: another model says which in-batch negatives are no negatives (GISTEmbed).

Letters: B anchors, N candidates, D full width of the student, E full width of the guide, L widths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting, truncate
from matryo.losses.info_nce import nested_info_nce

CHUNK_SCORES = 1 << 22
"""Guide cosines held at a time: 16 MB of float32."""


def guided_ignore(
    guide_anchors_BE: Tensor,
    guide_candidates_NE: Tensor,
    *,
    targets: Tensor | None = None,
    margin: float = 0.0,
    relative: bool = False,
) -> Tensor:
    """Which pairs a guide takes for false negatives; give it to `nested_info_nce(ignore=...)`.

    GISTEmbed (arXiv 2402.16829), section 3: candidate j is left out for anchor i when the guide finds it more like the
    anchor than the anchor's own positive, cos(g_i, g_j) > cos(g_i, g_target) - margin. Candidates may be positives,
    hard negatives and, to contrast anchors too, the anchors themselves: an anchor's own copy is then always masked.

    Args:
        guide_anchors_BE: (B, E) guide embeddings of the anchors, any row lengths; a zero row has cosine 0.
        guide_candidates_NE: (N, E) guide embeddings of the candidates, in the order the loss gets them.
        targets: (B,) position of each anchor's positive; 0..B-1 by default.
        margin: taken off the positive's cosine; above 0 it also masks what is only nearly as close (copies of the
            positive for certain), below 0 it masks less. 0 is the paper's rule.
        relative: the margin is a share of the positive's cosine: cos - margin |cos|.

    Returns:
        (B, N) bool, True where a pair is to be left out; never an anchor's own target. No gradient flows.

    Raises:
        InputError: shapes, targets or margin that do not fit; a guide row with NaN or Inf, which could mask nothing.
    """
    anchors, candidates = guide_anchors_BE.detach(), guide_candidates_NE.detach()
    places = _places(anchors, candidates, targets)
    if not torch.isfinite(torch.tensor(margin)):
        raise InputError(f"margin must be a finite number, got {margin}; 0 is the paper's rule")
    for name, rows in (("guide_anchors", anchors), ("guide_candidates", candidates)):
        bad = (~torch.isfinite(rows)).any(1).nonzero()
        if len(bad):
            raise InputError(f"row {int(bad[0])} of {name} holds NaN or Inf; remove it or encode it again")
    with torch.autocast(anchors.device.type, enabled=False):
        wide = torch.promote_types(anchors.dtype, torch.float32)
        anchors, candidates = (truncate(x.to(wide), x.shape[1]) for x in (anchors, candidates))
        size = max(1, CHUNK_SCORES // max(1, len(candidates)))
        parts = [
            _more_alike(rows, candidates, own, margin, relative)
            for rows, own in zip(torch.split(anchors, size), torch.split(places, size), strict=True)
        ]
    return torch.cat(parts)


def _more_alike(anchors: Tensor, candidates: Tensor, places: Tensor, margin: float, relative: bool) -> Tensor:
    cosines = anchors @ candidates.T
    positive = cosines.gather(1, places[:, None])
    mask = cosines > positive - margin * (positive.abs() if relative else 1.0)
    return mask.scatter_(1, places[:, None], False)


def nested_guided_info_nce(
    anchors_BD: Tensor,
    candidates_ND: Tensor,
    guide_anchors_BE: Tensor,
    guide_candidates_NE: Tensor,
    *,
    nesting: Nesting,
    guide_nesting: Nesting | None = None,
    margin: float = 0.0,
    relative: bool = False,
    temperature: float | Sequence[float] | Tensor = 0.05,
    targets: Tensor | None = None,
    ignore: Tensor | None = None,
    per_width: bool = False,
    **options: Any,
) -> Any:
    """Nested InfoNCE without the negatives that a guide takes for false ones, per width if the guide is nested too.

    GISTEmbed (arXiv 2402.16829), section 3, inside Matryoshka Representation Learning (arXiv 2205.13147), equation 1.
    With `guide_nesting` the mask of each width comes from the guide's prefix of the width in the same place, so that a
    short prefix is not asked to tell apart what a short prefix of the guide cannot. Without it the guide's full
    width masks every width.

    Args:
        anchors_BD: (B, D), as for `nested_info_nce`.
        candidates_ND: (N, D), the positives first.
        guide_anchors_BE: (B, E) the guide's embeddings of the same texts; E may differ from D.
        guide_candidates_NE: (N, E).
        nesting: widths and weights of the student.
        guide_nesting: as many widths as `nesting` has, the last of them E; its weights mean nothing.
        margin: as for `guided_ignore`.
        relative: as for `guided_ignore`.
        temperature: one, one per width, or a tensor of either shape, as for `nested_info_nce`.
        targets: (B,) position of each anchor's positive; 0..B-1 by default.
        ignore: (B, N) bool, pairs to leave out whatever the guide says.
        per_width: also return the (L,) unweighted loss of each width, detached.
        **options: `symmetric`, `group` and `chunk` of `nested_info_nce`.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values).

    Raises:
        InputError: what `nested_info_nce` and `guided_ignore` refuse; a guide of another number of rows or widths.
    """
    for one, other in ((anchors_BD, guide_anchors_BE), (candidates_ND, guide_candidates_NE)):
        if len(one) != len(other):
            raise InputError(f"the guide must embed the same texts: {len(one)} rows here, {len(other)} of the guide")
    shared = {"targets": targets, **options}

    def mask(width: int) -> Tensor:
        guides = guide_anchors_BE[:, :width], guide_candidates_NE[:, :width]
        found = guided_ignore(*guides, targets=targets, margin=margin, relative=relative)
        return found if ignore is None else found | ignore

    if guide_nesting is None:
        return nested_info_nce(
            anchors_BD,
            candidates_ND,
            nesting=nesting,
            temperature=temperature,
            ignore=mask(guide_anchors_BE.shape[-1]),
            per_width=per_width,
            **shared,
        )
    nesting.check(anchors_BD.shape[-1])
    guide_nesting.check(guide_anchors_BE.shape[-1])
    if len(guide_nesting) != len(nesting):
        raise InputError(
            f"guide_nesting needs one width for each of {list(nesting.widths)}, got {list(guide_nesting.widths)}"
        )
    temperatures = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature, dtype=torch.float64)
    if temperatures.ndim > 1 or (temperatures.ndim == 1 and len(temperatures) != len(nesting)):
        shape = tuple(temperatures.shape)
        raise InputError(f"temperature must be one number or one per width ({len(nesting)}), got shape {shape}")
    # Masks differ by width, so the widths are taken one by one: a prefix alone is a nesting of one width.
    values = [
        nested_info_nce(
            anchors_BD[:, :width],
            candidates_ND[:, :width],
            nesting=Nesting([width]),
            temperature=degree,
            ignore=mask(guide_width),
            **shared,
        )
        for width, guide_width, degree in zip(
            nesting.widths, guide_nesting.widths, temperatures.expand(len(nesting)), strict=True
        )
    ]
    total = torch.stack([weight * value for weight, value in zip(nesting.weights, values, strict=True)]).sum()
    return (total, torch.stack(values).detach()) if per_width else total


def _places(anchors: Tensor, candidates: Tensor, targets: Tensor | None) -> Tensor:
    """(B,) target positions, once everything fits."""
    if anchors.ndim != 2 or candidates.ndim != 2 or anchors.shape[1] != candidates.shape[1]:
        shapes = f"{tuple(anchors.shape)} and {tuple(candidates.shape)}"
        raise InputError(f"guide anchors must be (B, E) and guide candidates (N, E), got {shapes}")
    size, count = len(anchors), len(candidates)
    if targets is None:
        if count < size:
            raise InputError(f"{size} anchors need at least {size} candidates (the positives first), got {count}")
        return torch.arange(size, device=anchors.device)
    if targets.shape != (size,) or targets.is_floating_point():
        raise InputError(f"targets must be ({size},) integers, got {tuple(targets.shape)} of {targets.dtype}")
    if size and not 0 <= int(targets.min()) <= int(targets.max()) < count:
        raise InputError(f"targets must lie in 0..{count - 1}, got {int(targets.min())}..{int(targets.max())}")
    return targets.to(anchors.device)
