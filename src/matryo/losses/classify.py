"""Classification at every width: linear heads on prefixes, and their cross-entropy.

Letters: B rows of a batch, R rows of a chunk, C classes, D full width, L widths, d a width.

MRL-E ties the heads: the head of width d is the first d columns of one weight (C, D), with one bias. The logits of
width l are then those of width l-1 plus one block of columns times the same block of the features, so all widths
together cost one product of full width. Backwards the same holds: with Z_l the logits, the gradient of block k is the
sum over l >= k of dloss/dZ_l times the features' (or the weight's) block k; walking the widths from the widest down,
that is a running sum and each block needs one product. The gradient is formed in the same pass as the value, in chunks
of rows: nothing of size B x C outlives a chunk.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting, truncate
from matryo.losses.checks import check_embeddings, check_finite, check_labels
from matryo.losses.widths import wide_type

CHUNK_SCORES = 24 << 20
"""Logits that the buffers of a chunk hold together: 96 MB of float32. Every chunk reads the whole weight once more, so
fewer and larger chunks are better here than in a contrastive loss."""
FROM_SCRATCH = 16
"""Widths up to D over this are worked on after the wider ones and in the same buffers. The wider ones do not start from
their logits then: D / 16 columns more of one product, for about half of the buffers when widths double."""
NARROW = 16
"""Products whose result has fewer columns than this are taken transposed, which CPU libraries do 10 times as fast."""


class NestedHead(nn.Module):
    """Linear classifiers on every prefix (arXiv 2205.13147, section 3).

    Prefixes go in as they are: the paper's classifiers, unlike its retrieval, see raw features, and a linear head
    learns from their lengths. With `normalize` each prefix is scaled to unit length first, as an index would hold it.

    Args:
        nesting: the widths; its weights are not used.
        num_classes: C >= 1.
        tied: False is MRL, one linear layer per width. True is MRL-E: one weight (C, D) and one bias (C,), of which
            width d reads the first d columns; the parameters of a single full-width head.
        normalize: renormalise each prefix first. All tied widths then cost one head each.

    State dict: `linears.<n>.weight` and `.bias`, the n-th width's, or only n = 0 when tied.
    """

    def __init__(self, nesting: Nesting, num_classes: int, tied: bool = False, normalize: bool = False) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise InputError(f"num_classes must be an integer of at least 1, got {num_classes!r}")
        self.nesting, self.num_classes, self.tied, self.normalize = nesting, num_classes, tied, normalize
        widths = (nesting.D,) if tied else nesting.widths
        self.linears = nn.ModuleList(nn.Linear(width, num_classes) for width in widths)

    def forward(self, features_BD: Tensor, width: int | None = None) -> Tensor:
        """Logits: (B, C) of one trained width, or (L, B, C) of all, in float32 (float64 for float64 input)."""
        check_embeddings("features", features_BD, self.nesting)
        if width is not None and width not in self.nesting.widths:
            raise InputError(f"this head has no width {width}; its widths are {list(self.nesting.widths)}")
        with torch.autocast(features_BD.device.type, enabled=False):
            if width is not None:
                return F.linear(*self.parts(_wide(features_BD), width))
            if self.normalize or not self.tied:
                return torch.stack([F.linear(*self.parts(_wide(features_BD), d)) for d in self.nesting.widths])
            x, weight, bias = self.parts(_wide(features_BD), self.nesting.D)
            return torch.stack([x[:, b] @ weight[:, b].T for b in self.nesting.blocks]).cumsum(0) + bias

    def parts(self, features: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `F.linear` takes at one width: (B, d) prefixes, (C, d) weight, (C,) bias, all in the features' dtype."""
        prefix = truncate(features, width) if self.normalize else features[:, :width]
        weight, bias = self.parameters_at(width)
        return prefix, weight.to(features.dtype), bias.to(features.dtype)

    def parameters_at(self, width: int) -> tuple[Tensor, Tensor]:
        """(C, d) weight and (C,) bias of one width."""
        linear = self.linears[0 if self.tied else self.nesting.widths.index(width)]
        assert isinstance(linear, nn.Linear)
        # A slice of everything would cost a copy of the gradient.
        weight = linear.weight if width == linear.in_features else linear.weight[:, :width]
        return weight, linear.bias

    def extra_repr(self) -> str:
        return f"widths={list(self.nesting.widths)}, tied={self.tied}, normalize={self.normalize}"


def nested_cross_entropy(
    features_BD: Tensor,
    labels_B: Tensor,
    head: NestedHead,
    *,
    nesting: Nesting,
    label_smoothing: float = 0.0,
    per_width: bool = False,
) -> Any:
    """Nested softmax cross-entropy: sum over widths of c_d times the mean over rows of
    cross-entropy(head_d(x_i[:d]), y_i). Matryoshka Representation Learning (arXiv 2205.13147), equation 1.

    With a tied head (MRL-E) all widths cost about one full-width head. Separate heads cost one head each. Neither keeps
    logits for the backward pass.

    `nesting` may be a part of the head's widths (sampled widths) that ends with D. Separate heads of the widths left
    out get a gradient of zero, not none: that is what an unbiased sample says, every parameter has a gradient at each
    step, and DistributedDataParallel needs no `find_unused_parameters`. The head's parameters are read here and not in
    its `forward`: give DistributedDataParallel a module that holds the head and calls this loss in its `forward`.

    Args:
        features_BD: (B, D) floating.
        labels_B: (B,) integers in 0..C-1.
        head: its widths must include the nesting's.
        nesting: widths and weights; its last width must be D.
        label_smoothing: epsilon in 0..1: targets are 1 - epsilon + epsilon / C and epsilon / C (arXiv 1512.00567,
            section 7), as in torch.
        per_width: also return the (L,) unweighted loss of each width, detached.

    Returns:
        A scalar in float32 (float64 for float64 features), or (scalar, per-width values). Half precision is widened and
        autocast is off inside; gradients come back in each tensor's dtype. Differentiable once.

    Raises:
        InputError: shapes, labels, widths or the smoothing do not fit, or a loss is NaN or infinite (names the width
            and the first bad row).
    """
    check_embeddings("features", features_BD, nesting)
    check_labels(labels_B, len(features_BD))
    _check_head(labels_B, head, nesting, label_smoothing)
    labels = labels_B.to(features_BD.device, torch.int64)
    with torch.autocast(features_BD.device.type, enabled=False):
        x = _wide(features_BD)
        if head.tied and not head.normalize:
            total, values = _cross_entropy(*head.parts(x, nesting.D), labels, nesting, label_smoothing)
        else:
            single = [
                _cross_entropy(*head.parts(x, width), labels, Nesting([width]), label_smoothing)[0]
                for width in nesting.widths
            ]
            total = sum(weight * value for weight, value in zip(nesting.weights, single, strict=True))
            # An empty sum is 0 whatever the parameters hold, and its gradient is zeros.
            for width in set(head.nesting.widths) - set(nesting.widths):
                total = total + sum(parameter[:0].sum() for parameter in head.parameters_at(width))
            values = torch.stack(single).detach()
    weights = {f"the head's weight at width {width}": head.parameters_at(width)[0] for width in nesting.widths}
    check_finite(values, nesting, {"features": features_BD, **weights})
    return (total, values) if per_width else total


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_type(x))


def _check_head(labels: Tensor, head: NestedHead, nesting: Nesting, label_smoothing: float) -> None:
    unknown = [width for width in nesting.widths if width not in head.nesting.widths]
    if unknown:
        raise InputError(
            f"the head has no width {unknown[0]}: its widths are {list(head.nesting.widths)}, the loss asks for "
            f"{list(nesting.widths)}; build the head with the nesting it is trained with"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= head.num_classes:
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise InputError(f"labels must lie in 0..{head.num_classes - 1} for this head, got {bad}")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing must lie in 0..1, got {label_smoothing}")


def _cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, nesting: Nesting, label_smoothing: float
) -> Any:
    return _PrefixCrossEntropy.apply(features, weight, bias, labels, nesting, label_smoothing)  # type: ignore[no-untyped-call]


class _PrefixCrossEntropy(torch.autograd.Function):
    """(total, values) of one tied head at every width of a nesting."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, nesting: Nesting, smoothing: float
    ) -> Any:
        sweep = _Sweep(features, weight, bias, nesting, smoothing)
        values, ctx.gradients = sweep.run(labels, ctx.needs_input_grad[:3])
        ctx.save_for_backward(features, weight, bias, labels)
        ctx.setting = nesting, smoothing
        ctx.mark_non_differentiable(values)
        return (values.new_tensor(nesting.weights) * values).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _values: Tensor) -> Any:
        # The gradients are given away: the weight's is as large as the weight, and a scaled copy of it would cost more
        # than all the narrow widths. A second backward through the same graph forms them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            features, weight, bias, labels = ctx.saved_tensors
            with torch.autocast(features.device.type, enabled=False):
                _, gradients = _Sweep(features, weight, bias, *ctx.setting).run(labels, ctx.needs_input_grad[:3])
        if upstream.device.type != "cpu" or float(upstream) != 1:
            gradients = [None if gradient is None else gradient.mul_(upstream) for gradient in gradients]
        return (*gradients, None, None, None)


class _Sweep:
    """One evaluation: chunks of rows; in each, widths upwards for the logits, downwards for the gradient."""

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor, nesting: Nesting, smoothing: float) -> None:
        self.features, self.weight, self.bias = features, weight, bias
        self.nesting, self.blocks, self.smoothing = nesting, nesting.blocks, smoothing
        narrow = sum(width * FROM_SCRATCH <= nesting.D for width in nesting.widths)
        self.groups = [range(narrow, len(nesting)), range(narrow)]
        buffers, classes = max(len(levels) for levels in self.groups), len(weight)
        self.rows = min(len(features), max(1, CHUNK_SCORES // (buffers * classes)))
        self.logits = features.new_empty(buffers, self.rows, classes)
        self.chances, self.suffix = (features.new_empty(self.rows, classes) for _ in range(2))

    def run(self, labels: Tensor, needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """(L,) loss at each width, and the gradients of features, weight and bias that are needed (else None)."""
        size = len(self.features)
        values = self.features.new_zeros(len(self.blocks))
        gradients = [
            torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
            for x, wanted in zip((self.features, self.weight, self.bias), needed, strict=True)
        ]
        for start in range(0, size, self.rows):
            rows = slice(start, min(start + self.rows, size))
            suffix = self.suffix[: rows.stop - start].zero_() if any(needed) else None
            for levels in self.groups:
                for level, logits in reversed(list(zip(levels, self._logits(levels, rows), strict=True))):
                    values[level] += self._level(level, logits, labels[rows], suffix)
                    if suffix is not None:
                        self._add_products(level, rows, suffix, gradients)
            if suffix is not None and gradients[2] is not None:
                # After the narrowest width the suffix sum is the sum over all widths, which the shared bias needs.
                total = suffix.sum(0)
                gradients[2] = total if start == 0 else gradients[2].add_(total)
        return values, gradients

    def _logits(self, levels: range, rows: slice) -> list[Tensor]:
        """(R, C) logits at each of these widths, in buffers that the next call overwrites."""
        logits: list[Tensor] = []
        start, below = 0, self.bias
        for level, buffer in zip(levels, self.logits, strict=False):
            stop = self.nesting.widths[level]
            part = self.features[rows, start:stop]
            below = torch.addmm(below, part, self.weight[:, start:stop].T, out=buffer[: len(part)])
            logits.append(below)
            start = stop
        return logits

    def _level(self, level: int, logits: Tensor, labels: Tensor, suffix: Tensor | None) -> Tensor:
        """This chunk's share of the loss at one width; takes its gradient by the logits into `suffix`."""
        share, classes = 1 / len(self.features), len(self.weight)
        chances = self.chances[: len(labels)]
        torch.softmax(logits, 1, out=chances)
        # The largest chance is exp(top - log_sum) and never below 1 / C, so its logarithm loses nothing; the label's
        # own chance may be 0.
        log_sums = logits.amax(1) - chances.amax(1).log()
        own = torch.arange(len(labels), device=labels.device)
        value = log_sums - (1 - self.smoothing) * logits[own, labels]
        if self.smoothing:
            value = value - self.smoothing * logits.mean(1)
        if suffix is not None:
            scale = share * self.nesting.weights[level]
            suffix.add_(chances, alpha=scale)
            suffix[own, labels] -= scale * (1 - self.smoothing)
            if self.smoothing:
                suffix.sub_(scale * self.smoothing / classes)
        return share * value.sum()

    def _add_products(self, level: int, rows: slice, suffix: Tensor, gradients: list[Tensor | None]) -> None:
        block = self.blocks[level]
        features, weight, _ = gradients
        if features is not None:
            _multiply(suffix, self.weight[:, block], features[rows, block], add=False)
        if weight is not None:
            _multiply(suffix.T, self.features[rows, block], weight[:, block], add=rows.start > 0)


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    """out = left @ right, or out += left @ right."""
    if right.shape[1] < NARROW:
        product = (right.T @ left.T).T
        out.add_(product) if add else out.copy_(product)
    elif add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)
