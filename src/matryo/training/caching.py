"""Gradient caching: a batch of any size in the memory of a mini-batch, with exactly the gradient of the whole batch.

Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache, arXiv 2101.06983), as one node of
the autograd graph:

1. forward: every column is embedded mini-batch by mini-batch without a graph; only the embeddings at full width and the
   random states are kept;
2. the loss, at all widths and with each weight once, is computed on those embeddings, by whoever called;
3. backward: when the loss's gradient arrives, each mini-batch is embedded once more, now with a graph, under its
   random state and the autocast state of the first time, and its part of the gradient goes on into the parameters.

As the gradient arrives through autograd, loss scaling, division for gradient accumulation, learned temperatures, heads
and gathering across processes need nothing special: `loss.backward()` is all there is to call. Because parameters
receive their gradients inside the node, `torch.autograd.grad` with respect to them does not see them.

From sentence-transformers' caching engine come the random states (`RandContext`) and the cutting of features of every
kind, flattened and visual ones included. Its `CachedLossMixin` does not serve: it runs backward inside forward, so a
loss's own parameters get a gradient that neither the loss scaler nor gradient accumulation has scaled, it replays
outside the caller's autocast, and nesting it means cutting and back-propagating once a width.

Exact for encoders whose rows do not look at each other. Batch normalisation in training mode sees mini-batches instead
of the batch, and updates its running figures in both passes.

**DDP.** All mini-batches but the last are replayed under `no_sync`; the last sets off the one reduction of the step,
unless the caller is inside `no_sync` itself (gradient accumulation). Processes may have different numbers of
mini-batches. `static_graph=True` is refused. **FSDP.** Nothing is held back: each replay gathers and frees its
parameters and reduces its gradients into the shards, which adds up to the same gradient, with communication per
mini-batch. Every process must then run the same number of mini-batches, or the collectives of the parameters do not
meet: use `dataloader_drop_last`. What `losses.gather` gathers are embeddings, outside the sharded modules, so it does
not change under FSDP.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import RandContext, _create_minibatch, _minibatch_ranges
from sentence_transformers.sentence_transformer.modules import Router
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from matryo.core.errors import InputError

Features = dict[str, Any]


def sentence_embedding(output: Any) -> Tensor:
    """(B, D) from what a sentence-transformers model returns."""
    embedding: Tensor = output["sentence_embedding"]
    return embedding


def cached_embeddings(
    model: nn.Module,
    features: Sequence[Features],
    *,
    mini_batch_size: int,
    mini_batch_tokens: int | None = None,
    read: Callable[[Any], Tensor] = sentence_embedding,
) -> list[Tensor]:
    """Embeddings of whole columns whose backward pass embeds mini-batch by mini-batch (arXiv 2101.06983).

    Use as if it were `[read(model(f)) for f in features]`; value and gradient are the same, dropout included. Neither
    the model nor the features are changed. With gradients off nothing is kept.

    Args:
        model: the encoder, bare or wrapped (DDP, FSDP, compiled).
        features: one dict a column (anchor, positive, negatives), tensors with the batch first.
        mini_batch_size: rows embedded at a time; the last mini-batch may be smaller. Does not change the result.
        mini_batch_tokens: cut by tokens instead: as many rows as hold at most this many.
        read: the (B, ...) embeddings in what the model returns.

    Returns:
        The (B, D) embeddings of each column, at full width.

    Raises:
        InputError: a mini-batch of no rows, features of a static encoder (which has no activations to save), DDP with
            `static_graph`.
    """
    if mini_batch_size < 1 or (mini_batch_tokens is not None and mini_batch_tokens < 1):
        raise InputError(f"a mini-batch needs at least 1 row, got {mini_batch_size} (and {mini_batch_tokens} tokens)")
    if any("offsets" in f for f in features):
        raise InputError("a static encoder keeps no activations, so caching saves nothing; leave mini_batch_size out")
    if getattr(_unwrapped(model), "static_graph", False):
        raise InputError("gradient caching runs the encoder several times a step; make DDP without static_graph")
    tape = _Tape(model, features, mini_batch_size, mini_batch_tokens, read)
    if not torch.is_grad_enabled():
        return tape.embed_all(keep=False)
    trigger = torch.zeros((), requires_grad=True)
    return list(_Cached.apply(tape, trigger))  # type: ignore[no-untyped-call]


class _Tape:
    """What it takes to embed the same columns again."""

    def __init__(
        self,
        model: nn.Module,
        features: Sequence[Features],
        mini_batch_size: int,
        mini_batch_tokens: int | None,
        read: Callable[[Any], Tensor],
    ) -> None:
        self.model, self.features, self.read = model, [dict(f) for f in features], read
        # Cut once: both passes must see the same mini-batches.
        self.ranges = [_minibatch_ranges(f, mini_batch_size, mini_batch_tokens) for f in self.features]
        self.states: dict[tuple[int, int], RandContext] = {}
        kinds = {x.device.type for f in self.features for x in f.values() if isinstance(x, Tensor)} | {"cpu"}
        self.autocast = [
            partial(torch.autocast, k, dtype=torch.get_autocast_dtype(k), enabled=torch.is_autocast_enabled(k))
            for k in sorted(kinds)
            if torch.amp.is_autocast_available(k)
        ]

    @property
    def places(self) -> list[tuple[int, int]]:
        """(column, mini-batch) in the order they are embedded."""
        return [(column, n) for column, ranges in enumerate(self.ranges) for n in range(len(ranges))]

    def embed_all(self, keep: bool) -> list[Tensor]:
        """The first pass: whole columns, without a graph."""
        columns: list[list[Tensor]] = [[] for _ in self.ranges]
        with torch.no_grad():
            for column, n in self.places:
                part = self._part(column, *self.ranges[column][n])
                if keep:
                    self.states[column, n] = RandContext(*part.values())
                columns[column].append(self._run(part))
        return [torch.cat(parts) for parts in columns]

    def embed(self, column: int, n: int, most: int | None = None) -> Tensor:
        """One mini-batch (or its first `most` rows) again, with its random state."""
        begin, end = self.ranges[column][n]
        with self.states[column, n]:
            return self._run(self._part(column, begin, min(end, begin + (most or end))))

    def _part(self, column: int, begin: int, end: int) -> Features:
        # Copies: a module may change what it is given in place, and slices would hand it the caller's own memory.
        part = _create_minibatch(self.features[column], begin, end)
        return {key: x.clone() if isinstance(x, Tensor) else x for key, x in part.items()}

    def _run(self, part: Features) -> Tensor:
        with ExitStack() as stack:
            for enter in self.autocast:
                stack.enter_context(enter())
            # Torch before 2.10 finds weights again that autocast cast without a graph, and their gradient is lost.
            stack.callback(torch.clear_autocast_cache)
            return self.read(self.model(part))


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: _Tape, trigger: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tape = tape
        return tuple(tape.embed_all(keep=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tape: _Tape = ctx.tape
        places = [(column, n) for column, n in tape.places if grads[column] is not None]
        for place in places:
            column, n = place
            last = place == places[-1]
            with nullcontext() if last else _no_reduction(tape.model), torch.enable_grad():
                rows = [tape.embed(column, n)]
                grad = grads[column]
                assert grad is not None, "columns without a gradient have no places"
                parts = [grad[slice(*tape.ranges[column][n])]]
                if last:
                    for other in _companions(tape, column):
                        rows.append(other)
                        parts.append(torch.zeros_like(other))
                pairs = [(r, g) for r, g in zip(rows, parts, strict=True) if r.requires_grad]
                if pairs:
                    torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])
        return None, None


def _companions(tape: _Tape, column: int) -> Iterator[Tensor]:
    """One row of each other column, where columns have encoders of their own: DDP reduces in the last replay, and in
    that one every parameter has to take part."""
    module = _unwrapped(tape.model)
    if isinstance(module, DistributedDataParallel) and any(isinstance(m, Router) for m in module.modules()):
        yield from (tape.embed(other, 0, most=1) for other in range(len(tape.ranges)) if other != column)


@contextmanager
def _no_reduction(model: nn.Module) -> Iterator[None]:
    module = _unwrapped(model)
    with module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext():
        yield


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module beneath torch.compile."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner
