"""Candidates of every process: embeddings gathered once at full width, with gradient; prefixes are cut afterwards.

Each of W processes holds some rows. The rows of an InfoNCE loss stay where they are; its candidates are everyone's, so
the loss's work is split over the processes. Gathering copies; its backward pass adds up what every process' loss says
about a row, and hands the row's owner the sum. That is one collective each way, whatever the number of widths, columns
and mini-batches.

**The factor.** Data-parallel training (DDP) takes the *mean* of the processes' gradients. With n_r of N rows here, the
loss of the whole batch is L = sum over r of (n_r / N) * (mean over own rows), so a process must train on
`share` = W * n_r / N times its own mean: the mean over processes of those gradients is the gradient of L, uneven last
batches included. A loss that is computed on the gathered rows as a whole, the same on every process, is L already and
takes no factor: each process' gradient then holds W times its own rows' part, which the mean undoes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses.info_nce import nested_info_nce


def processes() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Gathered:
    """The rows of every process, in the order of the processes."""

    columns: tuple[Tensor, ...]
    """Each (N, D_k), at full width, with gradient back to the rows' owners."""
    labels: Tensor | None
    """(N,) labels or group numbers, exactly as given."""
    rows: slice
    """Where this process' rows stand among the N."""
    share: float
    """W * own rows / N: what the mean over own rows is multiplied by before backward."""

    @property
    def targets(self) -> Tensor:
        """(B,) the place of each own row: the `targets` of a loss whose candidates are `columns[0]` and then others."""
        return torch.arange(self.rows.start, self.rows.stop, device=self.columns[0].device)


def gather_with_gradient(
    columns: Sequence[Tensor], *, labels: Tensor | None = None, capacity: int | None = None
) -> Gathered:
    """Everyone's rows of some columns, by ONE collective; backward is one more, the sum of all processes' gradients.

    Columns travel side by side in one buffer of bytes, with the number of rows and the labels as 64-bit integers (or
    the bits of 64-bit floats) in front, so no label ever passes through half precision. Gradients of half-precision
    columns are added up in float32. Without a process group, or with one process, the columns come back as they are.

    Args:
        columns: one or more (B, D_k) embeddings of the same B rows; B may differ between processes.
        labels: (B,) integers or floats that travel along, without gradient; on every process or on none.
        capacity: the most rows a process can have (the batch size per process), the same number on every process.
            Rows are padded to it on the way. Without it the sizes are exchanged first, by one more collective.

    Raises:
        InputError: columns or labels of different lengths, more rows than `capacity`.
    """
    size = len(columns[0]) if columns else 0
    if not columns or any(x.ndim != 2 or len(x) != size for x in columns):
        raise InputError(f"columns must all be (B, D) with one B, got {[tuple(x.shape) for x in columns]}")
    if labels is not None and labels.shape != (size,):
        raise InputError(f"labels must be ({size},), one a row, got {tuple(labels.shape)}")
    if capacity is not None and size > capacity:
        raise InputError(f"{size} rows do not fit a capacity of {capacity}; give the batch size per process")
    if processes() == 1:
        return Gathered(tuple(columns), labels, slice(0, size), 1.0)
    if capacity is None:
        capacity = max(row_counts(size, columns[0].device))
    side_by_side = torch.cat(list(columns), 1)
    bits = None if labels is None else _to_bits(labels).to(side_by_side.device)
    everything, all_bits, counts = _Gather.apply(side_by_side, bits, capacity)  # type: ignore[no-untyped-call]
    start = sum(counts[: dist.get_rank()])
    parts = everything.split([x.shape[1] for x in columns], 1)
    return Gathered(
        tuple(part.to(x.dtype) for part, x in zip(parts, columns, strict=True)),
        None if labels is None else _from_bits(all_bits, labels.dtype),
        slice(start, start + size),
        processes() * size / sum(counts),
    )


def row_share(size: int, device: torch.device | str = "cpu") -> float:
    """`share` of a loss that needs no other process' rows (cross-entropy, distillation): one all-reduce of a number.

    Args:
        size: this process' rows.
        device: where the backend works: the embeddings' device.
    """
    return 1.0 if processes() == 1 else processes() * size / sum(row_counts(size, device))


def gathered_info_nce(
    columns: Sequence[Tensor],
    *,
    nesting: Nesting,
    temperature: float | Sequence[float] | Tensor = 0.05,
    group: Tensor | None = None,
    symmetric: bool = False,
    capacity: int | None = None,
    per_width: bool = False,
) -> Any:
    """`nested_info_nce` with the candidates of every process; on one process exactly that function.

    Only own anchors are rows, so each process does its part of the work. The mean over processes of the result, and of
    its gradients, are those of `nested_info_nce` on the whole batch. One gather and one reduce a step for all columns.

    The symmetric form asks of each positive which anchor it belongs to, for which everyone's anchors are needed:
    they travel in the same collective, and the second direction is `nested_info_nce` with own positives as rows and
    all anchors as candidates. The masks of both directions are the same, as `group` is about pairs.

    Args:
        columns: (B, D) each: anchors, positives, then any hard negatives.
        nesting, temperature, symmetric, per_width: as in `nested_info_nce`.
        group: (B,) integers with one meaning on every process, negative for none.
        capacity: see `gather_with_gradient`.

    Returns:
        `share` times the mean over own anchors; with `per_width` also the (L,) values, times `share` too.
    """
    if len(columns) < 2:
        raise InputError(f"InfoNCE needs a column of anchors and one of positives, got {len(columns)} columns")
    anchors, *others = columns
    options: dict[str, Any] = {"nesting": nesting, "temperature": temperature, "per_width": True}
    if processes() == 1:
        total, values = nested_info_nce(anchors, torch.cat(others), group=group, symmetric=symmetric, **options)
        return (total, values) if per_width else total
    every = gather_with_gradient([*others, anchors] if symmetric else others, labels=group, capacity=capacity)
    candidates = torch.cat(every.columns[: len(others)])
    padded: Tensor | None = None
    if every.labels is not None:
        padded = torch.cat([every.labels, every.labels.new_full((len(candidates) - len(every.labels),), -1)])
    total, values = nested_info_nce(anchors, candidates, targets=every.targets, group=padded, **options)
    if symmetric:
        back, back_values = nested_info_nce(
            others[0], every.columns[-1], targets=every.targets, group=every.labels, **options
        )
        total, values = (total + back) / 2, (values + back_values) / 2
    total, values = total * every.share, values * every.share
    return (total, values) if per_width else total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bits: Tensor | None, capacity: int) -> Any:
        ctx.set_materialize_grads(False)
        size, width = rows.shape
        head = torch.full((1 + capacity,), -1, dtype=torch.int64, device=rows.device)
        head[0] = size
        if bits is not None:
            head[1 : 1 + size] = bits
        body = rows.new_zeros(capacity, width)
        body[:size] = rows
        body_bytes = body.view(torch.uint8).flatten()
        # Every process' part begins at a multiple of 8 bytes, so that it can be read in place as numbers again.
        gap = body_bytes.new_zeros(-len(body_bytes) % 8)
        sent = torch.cat([head.view(torch.uint8), body_bytes, gap])
        received = sent.new_empty(processes() * len(sent))
        all_gather(received, sent)
        received = received.view(processes(), -1)
        heads = received[:, : 8 * len(head)].view(torch.int64)
        bodies = received[:, 8 * len(head) : 8 * len(head) + len(body_bytes)].view(rows.dtype)
        counts = heads[:, 0].tolist()
        everything = torch.cat([part.view(capacity, width)[:n] for part, n in zip(bodies, counts, strict=True)])
        all_bits = torch.cat([part[1 : 1 + n] for part, n in zip(heads, counts, strict=True)])
        ctx.mark_non_differentiable(all_bits)
        ctx.counts, ctx.capacity, ctx.dtype = counts, capacity, rows.dtype
        return everything, all_bits, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        assert grad is not None, "the gathered rows took no part in the loss"
        wide = grad.to(torch.promote_types(ctx.dtype, torch.float32)).contiguous()
        if any(n < ctx.capacity for n in ctx.counts):
            parts = torch.split(wide, ctx.counts)
            wide = wide.new_zeros(len(ctx.counts) * ctx.capacity, wide.shape[1])
            for place, part in zip(torch.split(wide, ctx.capacity), parts, strict=True):
                place[: len(part)] = part
        own = wide.new_empty(ctx.capacity, wide.shape[1])
        _reduce_scatter(own, wide)
        return own[: ctx.counts[dist.get_rank()]].to(ctx.dtype), None, None


def row_counts(size: int, device: torch.device | str) -> list[int]:
    """`size` of every process, by one collective."""
    own = torch.tensor([size], device=device)
    sizes = own.new_empty(processes())
    all_gather(sizes, own)
    return [int(n) for n in sizes]


def _to_bits(labels: Tensor) -> Tensor:
    return labels.double().view(torch.int64) if labels.is_floating_point() else labels.to(torch.int64)


def _from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return (bits.view(torch.float64) if dtype.is_floating_point else bits).to(dtype)


def all_gather(received: Tensor, sent: Tensor) -> None:
    """Every process' `sent`, in order, into the flat `received`."""
    # Newer torch renames both collectives and warns about the old names.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent)


def _reduce_scatter(received: Tensor, sent: Tensor) -> None:
    reduce: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(received, sent)
