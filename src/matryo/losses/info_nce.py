"""InfoNCE at every width for the price of one: the incremental Gram.

Letters: B anchors, N candidates, R rows of a chunk, D full width, L widths, d a width.

The logits of width l are G_l[i,j] * u_l[i] * v_l[j], where G_l is the product of the un-normalised prefixes,
u_l = 1 / (temperature_l |a_i[:d_l]|) and v_l = 1 / |c_j[:d_l]|. G_l is G_{l-1} plus the product of one block of
columns, so all L products together cost one product of full width. Backwards the same holds: the gradient of block k of
the candidates is (the sum over l >= k of W_l)^T times block k of the anchors, with W_l = dloss/dG_l; walking the widths
from the widest down, that suffix sum is a running sum and each block needs one product. What normalising adds to the
gradient is, per row and width, a multiple of the row itself. Rows are taken in chunks, and the gradient is formed in
the same pass as the value: nothing of size B x N outlives a chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.checks import check_finite
from matryo.losses.products import block_products

CHUNK_SCORES = 5 << 17
"""Rows x candidates of one Gram buffer: big enough for an efficient product, small enough to stay in a CPU's cache, and
that eight of them are less than the 32 MB from which glibc hands memory back to the system after every step (with what
large batches have beside, they are more, and a step is long then)."""
BUFFER_SCORES = 24 << 20
"""Scores all L Gram buffers of a chunk may hold together: 96 MB of float32."""
PLAIN_EXP_LIMIT = 40.0
"""exp(+-40) and sums of it are far inside float32, so logits up to it need no subtraction of the row's maximum."""
MASKED = -1e30
"""Logit of a masked pair: exp gives exactly 0, and 0 * MASKED is 0, where -inf would give NaN."""
LOG2E = math.log2(math.e)
"""Logits are kept in units of log 2: a power of two takes a CPU a quarter of the time of a power of e."""


def nested_info_nce(
    anchors_BD: Tensor,
    candidates_ND: Tensor,
    *,
    nesting: Nesting,
    temperature: float | Sequence[float] | Tensor = 0.05,
    targets: Tensor | None = None,
    symmetric: bool = False,
    ignore: Tensor | None = None,
    group: Tensor | None = None,
    chunk: int | None = None,
    per_width: bool = False,
) -> Any:
    """Nested InfoNCE (multiple negatives ranking): sum over widths of c_d times the mean over anchors of
    cross-entropy(cos(a_i[:d], c_j[:d]) / temperature_d, target_i).

    Exactly `nested(info_nce, nesting)`, value and gradient, at about the cost of the full width alone: Matryoshka
    Representation Learning (arXiv 2205.13147), equation 1, with InfoNCE (arXiv 1807.03748), equation 4.

    Args:
        anchors_BD: (B, D), any row lengths; a row whose prefix is zero has cosine 0 with everything at that width.
        candidates_ND: (N, D), the positives first (candidate i belongs to anchor i), then any hard negatives.
        nesting: widths and weights; its last width must be D.
        temperature: one for all widths, one per width, or a tensor of either shape that may require a gradient.
        targets: (B,) position of each anchor's positive among the candidates; 0..B-1 by default.
        symmetric: the mean of this direction and of candidate -> anchor (over the positives, negatives being the other
            anchors), as CLIP does. `targets` must then be distinct.
        ignore: (B, N) bool; True leaves a pair out of the denominator. An anchor's own target is never left out.
        group: (B,) or (N,) integers, for the first B or all candidates, negative for none; candidates of the
            target's group are left out of the denominator (false negatives), the target itself is kept.
        chunk: anchor rows worked on at a time; chosen from N and L by default. Does not change the result.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, per-width values). Half-precision input is widened
        first and autocast is off inside; gradients come back in the input's dtype. Differentiable once.

    Raises:
        InputError: shapes, widths, targets or temperatures that do not fit; one candidate alone, which there is nothing
            to tell from; a loss that is NaN or infinite (names the width and the first bad row).
    """
    _check(anchors_BD, candidates_ND, nesting, targets, ignore, group, symmetric, chunk)
    device, dtype = anchors_BD.device, torch.promote_types(anchors_BD.dtype, torch.float32)
    temperatures, coolest = _temperatures(temperature, len(nesting), device, dtype)
    places = torch.arange(len(anchors_BD), device=device) if targets is None else targets.to(device)
    if group is not None and len(group) < len(candidates_ND):
        group = torch.cat([group, group.new_full((len(candidates_ND) - len(group),), -1)])
    rows = chunk or max(
        1, min(CHUNK_SCORES // len(candidates_ND), BUFFER_SCORES // (len(candidates_ND) * len(nesting)))
    )
    setting = _Setting(
        nesting, places, symmetric, ignore, group, min(rows, len(anchors_BD)), 1 / coolest > PLAIN_EXP_LIMIT
    )
    total, values = _NestedInfoNCE.apply(anchors_BD, candidates_ND, temperatures, setting)  # type: ignore[no-untyped-call]
    check_finite(values, nesting, {"anchors": anchors_BD, "candidates": candidates_ND})
    return (total, values) if per_width else total


@dataclass
class _Setting:
    """What the loss was asked for, checked."""

    nesting: Nesting
    targets: Tensor
    symmetric: bool
    ignore: Tensor | None
    group: Tensor | None
    rows: int
    shifted: bool
    """Whether logits may be too large for a plain exp."""

    def mask(self, rows: slice, targets: Tensor) -> Tensor | None:
        """(R, N) True where a pair is left out, or None."""
        if self.ignore is None and self.group is None:
            return None
        mask: Tensor | None = None
        if self.group is not None:
            own = self.group[targets, None]
            mask = (own == self.group) & (own >= 0)
        if self.ignore is not None:
            mask = self.ignore[rows].clone() if mask is None else mask | self.ignore[rows]
        assert mask is not None
        mask[torch.arange(len(targets), device=mask.device), targets] = False
        return mask


class _NestedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, temperatures: Tensor, setting: _Setting) -> Any:
        wide = temperatures.dtype
        with torch.autocast(anchors.device.type, enabled=False):
            sweep = _Sweep(anchors.to(wide), candidates.to(wide), temperatures, setting)
            values = sweep.run(gradients=any(ctx.needs_input_grad[:3]))
        ctx.mark_non_differentiable(values)
        if sweep.gradients:
            ctx.save_for_backward(
                *(g.to(x.dtype) for g, x in zip(sweep.gradients, (anchors, candidates), strict=False))
            )
            ctx.temperature_gradient = sweep.gradients[2]
        weights = values.new_tensor(setting.nesting.weights)
        return (weights * values).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _values: Tensor) -> Any:
        anchors, candidates = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            anchors * upstream.to(anchors.dtype) if needs[0] else None,
            candidates * upstream.to(candidates.dtype) if needs[1] else None,
            ctx.temperature_gradient * upstream if needs[2] else None,
            None,
        )


class _Sweep:
    """One evaluation of the loss: chunks of rows; in each, widths upwards for the Gram, downwards for the gradient."""

    gradients: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(self, anchors: Tensor, candidates: Tensor, temperatures: Tensor, setting: _Setting) -> None:
        self.anchors, self.candidates, self.temperatures, self.setting = anchors, candidates, temperatures, setting
        chunk, levels = (setting.rows, len(candidates)), len(setting.nesting)
        spare = (levels + 2) * chunk[0] * chunk[1]
        self.products = block_products(anchors, candidates, setting.nesting.blocks, spare)
        room = self.products.spare.view(levels + 2, *chunk)
        self.logits, self.slopes, self.suffix = room[:levels], room[-2], room[-1]
        self.anchor_squares = self._prefix_squares(anchors)
        self.candidate_squares = self._prefix_squares(candidates)
        self.u = _inverse_root(self.anchor_squares) / temperatures[:, None]
        self.v = _inverse_root(self.candidate_squares)

    def _prefix_squares(self, x: Tensor) -> Tensor:
        """(L, rows) squared length of every prefix: the blocks' squares, added up (a norm makes no copy of them)."""
        norms = [torch.linalg.vector_norm(x[:, block], dim=1) for block in self.setting.nesting.blocks]
        return torch.stack(norms).square().cumsum(0)

    def run(self, gradients: bool) -> Tensor:
        """(L,) loss at each width; fills `gradients` of anchors, candidates and temperatures if asked."""
        size, levels = len(self.anchors), len(self.setting.nesting)
        values = self.anchors.new_zeros(levels)
        columns = self._column_log_sums() if self.setting.symmetric else None
        if gradients:
            # Sum over the other side of dloss/dlogit * logit: how the loss changes with a row's own length.
            self.row_pull = self.anchors.new_zeros(levels, size)
            self.column_pull = self.anchors.new_zeros(levels, len(self.candidates))
        for start in range(0, size, self.setting.rows):
            rows = slice(start, min(start + self.setting.rows, size))
            targets = self.setting.targets[rows]
            self._fill_logits(rows, self.setting.mask(rows, targets))
            for level in reversed(range(levels)):
                values[level] += self._level(level, rows, targets, columns, gradients)
                if gradients:
                    self.products.add_gradients(level, rows, self.suffix[: len(targets)])
        if gradients:
            self.grad_anchors, self.grad_candidates = self.products.gradients()
            self._add_pulls()
            temperature = -(self.row_pull.sum(1) / self.temperatures)
            self.gradients = (self.grad_anchors, self.grad_candidates, temperature)
        return values

    def _fill_logits(self, rows: slice, mask: Tensor | None) -> None:
        """Logits of these rows at every width, in units of log 2, read one after the other off the running Gram.

        The Gram may grow where the logits of the full width are wanted in the end.
        """
        scale = self.u[:, rows] * LOG2E
        room = self.logits[-1, : scale.shape[1]]
        for level, gram in enumerate(self.products.grams(rows, room)):
            logits = torch.mul(gram, self.v[level], out=self.logits[level, : len(gram)])
            logits.mul_(scale[level, :, None])
            if mask is not None:
                logits.masked_fill_(mask, MASKED)

    def _level(self, level: int, rows: slice, targets: Tensor, columns: Tensor | None, gradients: bool) -> Tensor:
        """This chunk's share of the loss at one width; leaves W_l in `suffix` if gradients are wanted."""
        logits = self.logits[level, : len(targets)]
        share = (0.5 if columns is not None else 1.0) / len(self.anchors)
        own = torch.arange(len(targets), device=targets.device)
        positives = logits[own, targets]
        slopes = self.slopes[: len(targets)]
        top = logits.amax(1) if self.setting.shifted else None
        torch.exp2(logits if top is None else torch.sub(logits, top[:, None], out=slopes), out=slopes)
        sums = slopes.sum(1)
        tops = 0.0 if top is None else top
        value = share / LOG2E * (sums.log2() + tops - positives).sum()
        if columns is not None:
            value = value + share / LOG2E * (columns[level, targets] - positives).sum()
        if gradients:
            # dloss/dlogit times u, the part of dlogit/dG that goes by row; what goes by column follows with the sum.
            weights = (self.setting.nesting.weights[level] * share) * self.u[level, rows]
            slopes.mul_((weights / sums)[:, None])
            if columns is not None:
                slopes.addcmul_(torch.exp2(logits - columns[level]), weights[:, None])
            slopes[own, targets] -= weights if columns is None else 2 * weights
            self._add_slopes(level, rows, logits, slopes)
        return value

    def _add_slopes(self, level: int, rows: slice, logits: Tensor, slopes: Tensor) -> None:
        """Take u * dloss/dlogits (destroyed) into the running suffix sum of W and into the pulls on both lengths."""
        u = self.u[level, rows]
        suffix = self.suffix[: len(slopes)]
        if level == len(self.logits) - 1:  # the widest comes first
            torch.mul(slopes, self.v[level], out=suffix)
        else:
            suffix.addcmul_(slopes, self.v[level])
        slopes.mul_(logits)
        back = torch.where(u > 0, 1 / (u * LOG2E), 0)
        self.row_pull[level, rows] = slopes.sum(1) * back
        self.column_pull[level].addmv_(slopes.T, back)

    def _add_pulls(self) -> None:
        """Normalising makes the loss blind to a prefix's length: take the radial part out of the gradient."""
        for x, grad, pull, squares in (
            (self.anchors, self.grad_anchors, self.row_pull, self.anchor_squares),
            (self.candidates, self.grad_candidates, self.column_pull, self.candidate_squares),
        ):
            radial = torch.where(squares > 0, pull / squares, 0).flip(0).cumsum(0).flip(0)
            for level, block in enumerate(self.setting.nesting.blocks):
                grad[:, block].addcmul_(x[:, block], radial[level, :, None], value=-1)

    def _column_log_sums(self) -> Tensor:
        """(L, N) log2 of the sum of exp2 over anchors of every column that is some anchor's target; +inf elsewhere
        (weight 0)."""
        shape = (len(self.logits), len(self.candidates))
        sums = self.anchors.new_full(shape, -torch.inf)
        for start in range(0, len(self.anchors), self.setting.rows):
            rows = slice(start, min(start + self.setting.rows, len(self.anchors)))
            self._fill_logits(rows, self.setting.mask(rows, self.setting.targets[rows]))
            for level, logits in enumerate(self.logits[:, : rows.stop - start]):
                top = logits.amax(0)
                torch.logaddexp2(sums[level], (logits - top).exp2().sum(0).log2() + top, out=sums[level])
        targeted = torch.zeros(shape[1], dtype=torch.bool, device=sums.device)
        targeted[self.setting.targets] = True
        return sums.masked_fill_(~targeted, torch.inf)


def _inverse_root(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares, 1).rsqrt() * (squares > 0)


def _temperatures(
    temperature: float | Sequence[float] | Tensor, levels: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(L,) temperatures, keeping the gradient of a tensor, and the smallest as a number."""
    given = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature, dtype=torch.float64)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != levels):
        raise InputError(f"temperature must be one number or one per width ({levels}), got shape {tuple(given.shape)}")
    smallest = float(given.detach().min())
    if not (smallest > 0 and float(given.detach().max()) < float("inf")):
        raise InputError(f"temperature must be finite and above 0, got {given.detach().tolist()}")
    return given.to(device=device, dtype=dtype).expand(levels), smallest


def _check(
    anchors: Tensor,
    candidates: Tensor,
    nesting: Nesting,
    targets: Tensor | None,
    ignore: Tensor | None,
    group: Tensor | None,
    symmetric: bool,
    chunk: int | None,
) -> None:
    if anchors.ndim != 2 or candidates.ndim != 2 or anchors.shape[1] != candidates.shape[1]:
        raise InputError(
            f"anchors must be (B, D) and candidates (N, D), got {tuple(anchors.shape)} and {tuple(candidates.shape)}"
        )
    nesting.check(anchors.shape[1])
    size, count = len(anchors), len(candidates)
    if size == 0:
        raise InputError("a batch needs at least one anchor, got none")
    if count == 1:
        raise InputError(
            "one candidate alone has no other to be told from, so it teaches nothing; give at least 2 candidates "
            "(drop a last batch of one)"
        )
    if targets is None and count < size:
        raise InputError(f"{size} anchors need at least {size} candidates (the positives first), got {count}")
    if targets is not None:
        if targets.shape != (size,) or targets.is_floating_point():
            raise InputError(f"targets must be ({size},) integers, got {tuple(targets.shape)} of {targets.dtype}")
        if int(targets.min()) < 0 or int(targets.max()) >= count:
            raise InputError(f"targets must lie in 0..{count - 1}, got {int(targets.min())}..{int(targets.max())}")
        if symmetric and int(torch.bincount(targets).max()) > 1:
            raise InputError("the symmetric form needs distinct targets: two anchors share a positive")
    if ignore is not None and (ignore.shape != (size, count) or ignore.dtype != torch.bool):
        raise InputError(f"ignore must be ({size}, {count}) bool, got {tuple(ignore.shape)} of {ignore.dtype}")
    if group is not None and (group.ndim != 1 or len(group) not in (size, count) or group.is_floating_point()):
        raise InputError(f"group must be ({size},) or ({count},) integers, got {tuple(group.shape)} of {group.dtype}")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1 row, got {chunk}")
