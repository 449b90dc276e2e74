"""The thin piece between a trainer and losses on tensors: features -> embeddings -> the loss of their data set."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.training.objectives import check_arguments, recipe
from matryo.training.static import merge_bags

POSITIVE = {"temperature", "scale"}
"""Arguments that are learned as a logarithm, so that they stay above 0."""


class Part(nn.Module):
    """One data set's loss by name, with whatever it learns beside the model: a head, a temperature."""

    def __init__(
        self, loss: str, arguments: Mapping[str, Any], nesting: Nesting, weight: float = 1.0, classes: int = 0
    ) -> None:
        """Take a loss of `recipe(loss)`.

        Raises:
            InputError: unknown arguments, or a value per width for another number of widths.
        """
        super().__init__()
        self.recipe, self.nesting, self.weight = recipe(loss), nesting, weight
        given = check_arguments(loss, arguments)
        learn = given.pop("learn", ())
        apart = {*self.recipe.extra, *learn}
        self.options = {name: value for name, value in given.items() if name not in apart}
        defaults = inspect.signature(self.recipe.call).parameters
        for name, value in given.items():
            if name in self.recipe.learnable() and isinstance(value, (list, tuple)) and len(value) != len(nesting):
                raise InputError(f"{name}: {len(value)} values for {len(nesting)} widths")
        self.learned = nn.ParameterDict()
        for name in learn:
            value = torch.tensor(given.get(name, defaults[name].default), dtype=torch.float32)
            if name in POSITIVE and float(value.min()) <= 0:
                raise InputError(f"loss {loss!r}: {name} must be above 0, got {value.tolist()}")
            self.learned[name] = nn.Parameter(value.log() if name in POSITIVE else value)
        self.head: nn.Module | None = None
        if "tied" in self.recipe.extra:
            from matryo.losses import NestedHead

            self.head = NestedHead(nesting, classes, tied=given.get("tied", False))

    def forward(self, columns: list[Tensor], labels: Tensor | None, nesting: Nesting) -> tuple[Tensor, Tensor]:
        """The weighted loss, and the plain loss at each width of `nesting` (L,), detached."""
        options = {**self._options(nesting), "nesting": nesting, "per_width": True}
        call, kind = self.recipe.call, self.recipe.rows
        if kind == "pairs":
            total, values = call(columns[0], torch.cat(columns[1:]), group=labels, **options)
        elif kind == "labelled":
            head = () if self.head is None else (self.head,)
            total, values = call(*columns, labels, *head, **options)
        else:
            total, values = call(*columns, *([] if labels is None else [labels]), **options)
        return self.weight * total, values

    def _options(self, nesting: Nesting) -> dict[str, Any]:
        """Arguments of the loss for the widths of a step."""
        places = [self.nesting.widths.index(width) for width in nesting.widths]
        per_width = self.recipe.learnable()
        options = {
            name: [value[n] for n in places] if name in per_width and isinstance(value, (list, tuple)) else value
            for name, value in self.options.items()
        }
        for name, parameter in self.learned.items():
            value = parameter.exp() if name in POSITIVE else parameter
            options[name] = value[places] if value.ndim else value
        return options

    def learned_values(self) -> dict[str, Any]:
        """What was learned beside the model and the head, in the loss's own terms."""
        exp = {name: name in POSITIVE for name in self.learned}
        return {
            name: (parameter.detach().exp() if exp[name] else parameter.detach()).tolist()
            for name, parameter in self.learned.items()
        }


class NestedObjective(nn.Module):
    """A model and the losses of its data sets. Every batch comes from one data set."""

    def __init__(self, model: nn.Module, nesting: Nesting, parts: Mapping[str, Part], sampler: Any = None) -> None:
        """Train `model` at the widths of `nesting`, or at those that `sampler` draws for each step."""
        super().__init__()
        self.model = model
        self.nesting = nesting
        self.parts = nn.ModuleDict(parts)
        self.sampler = sampler

    def forward(
        self, features: list[dict[str, Tensor]], labels: Tensor | None, name: str | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor, Nesting]:
        """The loss, the unweighted loss at each width trained in this step (L,), detached, and those widths.

        `labels` are what the data set's loss needs: groups, classes or scores.
        """
        nesting = self.sampler.draw(step) if self.sampler else self.nesting
        part = self.parts[name] if name is not None else next(iter(self.parts.values()))
        columns = self.embed(features)
        try:
            total, values = part(columns, labels, nesting)
        except InputError as error:
            blame = _bad_row(columns)
            raise InputError(blame) if blame else error from error
        if not torch.isfinite(total):
            width = nesting.widths[int((~torch.isfinite(values)).nonzero()[0])]
            reason = f"the loss is not finite at width {width}; raise the temperature or lower the learning rate"
            raise InputError(_bad_row(columns) or reason)
        return total, values, nesting

    def embed(self, features: list[dict[str, Tensor]]) -> list[Tensor]:
        """(B, D) for each column."""
        if all("offsets" in f for f in features):
            sizes = [len(f["offsets"]) for f in features]
            merged: dict[str, Any] = self.model(merge_bags(features))
            return list(merged["sentence_embedding"].split(sizes))
        return [self.model(f)["sentence_embedding"] for f in features]


def _bad_row(columns: list[Tensor]) -> str | None:
    names = ("first text", "second text", *(f"negative {n}" for n in range(1, len(columns))))
    for name, rows in zip(names, columns, strict=False):
        bad = (~torch.isfinite(rows)).any(1).nonzero()
        if len(bad):
            where = f"the {name} of row {int(bad[0])} of this batch"
            return f"the model gave NaN or Inf for {where}; lower the learning rate"
    return None
