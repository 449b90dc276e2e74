"""The thin piece between a trainer and losses on tensors: features -> embeddings -> the loss of their data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matryo.core.depths import DepthNesting, DepthSampler
from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.core.sampling import WidthSampler
from matryo.encoders.layers import Layers
from matryo.losses import NestedHead, gather_with_gradient, gathered_info_nce, over_depths
from matryo.training import processes
from matryo.training.caching import cached_embeddings
from matryo.training.lengths import by_length, embed_alike, trimmed
from matryo.training.objectives import check_arguments, recipe
from matryo.training.static import merge_bags

POSITIVE = {"temperature", "scale"}
"""Arguments that are learned as a logarithm, so that they stay above 0."""


@dataclass(frozen=True)
class Batch:
    """A step's rows as a loss sees them; with several processes, this process' part."""

    columns: Sequence[Tensor]
    """Embeddings, (B, D) each."""
    labels: Tensor | None = None
    """(B,) groups, classes or scores."""
    taught: Sequence[Tensor] = ()
    """The teacher's vectors of the same texts, (B, E) each."""

    def everyone(self) -> "Batch":
        """The rows of all processes. Each has as many, so their number need not be exchanged."""
        columns = [*self.columns, *(x.to(self.columns[0].device) for x in self.taught)]
        every = gather_with_gradient(columns, labels=self.labels, capacity=len(columns[0]))
        count = len(self.columns)
        return Batch(every.columns[:count], every.labels, every.columns[count:])

    @property
    def compares_nothing(self) -> bool:
        """One row, or scores that are all equal: what may be left over at the end of an epoch."""
        scores = self.labels if self.labels is not None and self.labels.is_floating_point() else None
        return len(self.columns[0]) < 2 or (scores is not None and bool((scores == scores[0]).all()))


class Part(nn.Module):
    """One data set's loss by name, with whatever it learns beside the model: a head, a temperature."""

    def __init__(
        self, loss: str, arguments: Mapping[str, Any], nesting: Nesting, weight: float = 1.0, classes: int = 0
    ) -> None:
        """Take the loss `recipe(loss)` for a nesting.

        Raises:
            InputError: unknown arguments, or a value per width for another number of widths.
        """
        super().__init__()
        self.loss, self.recipe, self.nesting, self.weight = loss, recipe(loss), nesting, weight
        given = check_arguments(loss, arguments)
        for name in {*self.recipe.learnable(), *self.recipe.nestings()} & given.keys():
            if isinstance(given[name], Sequence) and len(given[name]) != len(nesting):
                raise InputError(f"{name}: {len(given[name])} values for {len(nesting)} widths")
        learn = given.pop("learn", ())
        self.learned = nn.ParameterDict({name: self._start(name, given) for name in learn})
        self.options = {name: value for name, value in given.items() if name not in {*learn, *self.recipe.head}}
        options = {name: given[name] for name in self.recipe.head if name in given}
        self.head = NestedHead(nesting, classes, **options) if self.recipe.head else None

    def _start(self, name: str, given: Mapping[str, Any]) -> nn.Parameter:
        value = torch.tensor(given.get(name, self.recipe.signature[name].default), dtype=torch.float32)
        if name in POSITIVE and float(value.min()) <= 0:
            raise InputError(f"loss {self.loss!r}: {name} must be above 0, got {value.tolist()}")
        return nn.Parameter(value.log() if name in POSITIVE else value)

    def forward(self, batch: Batch, nesting: Nesting) -> tuple[Tensor, Any]:
        """The weighted loss of this process, and the plain loss at each width of `nesting`: (L,), or that by code."""
        options = {**self._options(nesting), "nesting": nesting, "per_width": True}
        if self.loss == "info_nce" and processes.count() > 1:
            # Every process takes its own anchors; other losses compare all rows on each process.
            size = len(batch.columns[0])
            total, values = gathered_info_nce(batch.columns, group=batch.labels, capacity=size, **options)
        else:
            if self.recipe.other_rows and processes.count() > 1:
                batch = batch.everyone()
            if self.recipe.rows in ("scored", "texts") and batch.compares_nothing:
                nothing = torch.stack([x.sum() for x in batch.columns]).sum() * 0
                return nothing, nothing.detach().expand(len(nesting))
            total, values = self._call(batch, options)
        return self.weight * total, values

    def _call(self, batch: Batch, options: dict[str, Any]) -> Any:
        call, rows, columns = self.recipe.call, self.recipe.rows, batch.columns
        taught = [x.to(columns[0].device, columns[0].dtype) for x in batch.taught]
        if rows == "pairs":
            guides = (taught[0], torch.cat(taught[1:])) if taught else ()
            return call(columns[0], torch.cat(list(columns[1:])), *guides, group=batch.labels, **options)
        if rows == "texts":
            return call(torch.cat(list(columns)), torch.cat(taught), **options)
        if rows == "lists":
            scores = [(taught[0] * other).sum(1) for other in taught[1:]]
            return call(columns[0], torch.stack(list(columns[1:]), 1), torch.stack(scores, 1), **options)
        if taught:
            return call(*columns, (taught[0] * (taught[1] - taught[2])).sum(1), **options)
        beside = [x for x in (batch.labels, self.head) if x is not None]
        return call(*columns, *beside, **options)

    def _options(self, nesting: Nesting) -> dict[str, Any]:
        """Arguments of the loss for the widths of a step."""
        places = [self.nesting.widths.index(width) for width in nesting.widths]
        options = {name: self.recipe.at(name, value, places) for name, value in self.options.items()}
        for name in self.recipe.nestings():
            if options.get(name) is not None:
                options[name] = Nesting(options[name])
        for name, parameter in self.learned.items():
            value = parameter.exp() if name in POSITIVE else parameter
            options[name] = value[places] if value.ndim else value
        return options

    def learned_values(self) -> dict[str, Any]:
        """What was learned beside the model and the head, in the loss's own terms."""
        found = {name: parameter.detach() for name, parameter in self.learned.items()}
        return {name: (value.exp() if name in POSITIVE else value).tolist() for name, value in found.items()}


class NestedObjective(nn.Module):
    """A model and the losses of its data sets. Every batch comes from one data set."""

    def __init__(
        self,
        model: nn.Module,
        nesting: Nesting,
        parts: Mapping[str, Part],
        sampler: WidthSampler | None = None,
        mini_batch_size: int | None = None,
        depths: DepthNesting | DepthSampler | None = None,
        bfloat16: bool = False,
    ) -> None:
        """Train `model` at the widths of `nesting`, or at those that `sampler` draws for each step; so too the depths.
        With `bfloat16` it is run in mixed precision; losses are in float32 all the same.

        Raises:
            InputError: depths of an encoder that has others, or whose layers cannot be cut; fixed pairs of depth and
                width for a loss that has a head or a teacher.
        """
        super().__init__()
        self.model = model
        self.nesting = nesting
        # A ModuleDict refuses a data set named like an attribute of a module, "train" among them.
        self.parts = dict(parts)
        self.losses = nn.ModuleList(parts.values())
        self.sampler = sampler
        self.mini_batch_size = mini_batch_size
        self.depths = depths
        self.mixed = bfloat16
        self.layers = None if depths is None else Layers(model)
        if depths is not None and self.layers is not None:
            self._check_depths(depths.depths if isinstance(depths, DepthSampler) else depths, self.layers.count)

    def _check_depths(self, depths: DepthNesting, layers: int) -> None:
        depths.check(layers)
        for part in self.parts.values():
            if (part.head or part.recipe.teacher) and any(n.D < self.nesting.D for n in depths.nestings):
                what = "a head" if part.head else "a teacher"
                raise InputError(f"loss {part.loss!r} has {what} of full width; leave the widths of each depth out")

    def forward(
        self,
        features: list[dict[str, Tensor]],
        labels: Tensor | None,
        name: str | None = None,
        step: int = 0,
        taught: Sequence[Tensor] = (),
    ) -> tuple[Tensor, dict[int | None, tuple[Nesting, Any]]]:
        """The loss, and for each depth (None where there is one only) its widths and the unweighted losses there, (L,).

        `labels` are what the data set's loss needs: groups, classes or scores.
        """
        part = self.parts[name] if name is not None else next(iter(self.parts.values()))
        nesting = self.sampler.draw(step) if self.sampler else self.nesting
        depths = self.depths.draw(step) if isinstance(self.depths, DepthSampler) else self.depths
        columns = self.embed(features, depths)
        found: dict[int | None, tuple[Nesting, Any]] = {}
        try:
            if depths is None:
                total, values = part(Batch(columns, labels, taught), nesting)
                found[None] = (nesting, values)
            else:
                if self.sampler:
                    depths = depths.at(nesting)
                total, each = over_depths(lambda own, its: part(Batch(own, labels, taught), its), columns, depths)
                found.update((depth, one) for depth, one in each.items())
        except InputError as error:
            blame = _bad_row(columns)
            raise InputError(blame) if blame else error from error
        if not torch.isfinite(total):
            reason = _where_not_finite(found)
            raise InputError(_bad_row(columns) or f"{reason}; raise the temperature or lower the learning rate")
        return total, found

    def embed(self, features: list[dict[str, Tensor]], depths: DepthNesting | None = None) -> list[Tensor]:
        """(B, D) for each column; with depths (B, K, D)."""
        if all("offsets" in f for f in features):
            sizes = [len(f["offsets"]) for f in features]
            merged: dict[str, Any] = self.model(merge_bags(features))
            return list(merged["sentence_embedding"].split(sizes))
        run: Any = self.model if depths is None or self.layers is None else self.layers.runner(depths.depths)
        if self.mini_batch_size is None:
            # One region for all calls: each of its own would cast every weight again.
            with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=self.mixed):
                return [embed_alike(run, f).float() for f in features]
        ordered, size = [by_length(f) for f in features], self.mini_batch_size
        short: Any = partial(_run_trimmed, run)
        columns = cached_embeddings(short, [f for f, _ in ordered], mini_batch_size=size)
        return [x if to is None else x[to] for x, (_, to) in zip(columns, ordered, strict=True)]


def _run_trimmed(run: Any, features: dict[str, Any]) -> Any:
    return run(trimmed(features))


def _where_not_finite(found: Mapping[int | None, tuple[Nesting, Any]]) -> str:
    for depth, (nesting, values) in found.items():
        if isinstance(values, Tensor) and not bool(torch.isfinite(values).all()):
            width = nesting.widths[int((~torch.isfinite(values)).nonzero()[0])]
            return f"the loss is not finite at width {width}" + (f" of depth {depth}" if depth else "")
    return "the loss is not finite"


def _bad_row(columns: Sequence[Tensor]) -> str | None:
    names = ("first text", "second text", *(f"negative {n}" for n in range(1, len(columns))))
    for name, rows in zip(names, columns, strict=False):
        bad = (~torch.isfinite(rows.flatten(1))).any(1).nonzero()
        if len(bad):
            where = f"the {name} of row {int(bad[0])} of this batch"
            return f"the model gave NaN or Inf for {where}; lower the learning rate"
    return None
