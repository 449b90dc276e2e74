"""The thin piece between a trainer and a loss on tensors: features -> embeddings -> loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses import nested_info_nce
from matryo.training.static import merge_bags


class NestedObjective(nn.Module):
    """Nested InfoNCE over the columns of a batch: anchor, positive, then hard negatives.

    `labels`, if given, are group numbers: rows of one group are never each other's negatives.
    """

    def __init__(
        self, model: nn.Module, nesting: Nesting, temperature: float | Sequence[float], symmetric: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.nesting = nesting
        self.temperature = temperature
        self.symmetric = symmetric

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss, and the unweighted loss at each width (L,), detached."""
        anchors, *others = self.embed(features)
        total, widths = nested_info_nce(
            anchors,
            torch.cat(others),
            nesting=self.nesting,
            temperature=self.temperature,
            symmetric=self.symmetric,
            group=labels,
            per_width=True,
        )
        if not torch.isfinite(total):
            raise InputError(self._blame([anchors, *others], widths))
        return total, widths

    def embed(self, features: list[dict[str, Tensor]]) -> list[Tensor]:
        """(B, D) for each column."""
        if all("offsets" in f for f in features):
            sizes = [len(f["offsets"]) for f in features]
            merged: dict[str, Any] = self.model(merge_bags(features))
            return list(merged["sentence_embedding"].split(sizes))
        return [self.model(f)["sentence_embedding"] for f in features]

    def _blame(self, columns: list[Tensor], widths: Tensor) -> str:
        names = ("anchor", "positive", *(f"negative {n}" for n in range(1, len(columns))))
        for name, rows in zip(names, columns, strict=False):
            bad = (~torch.isfinite(rows)).any(1).nonzero()
            if len(bad):
                where = f"the {name} of row {int(bad[0])} of this batch"
                return f"the model gave NaN or Inf for {where}; lower the learning rate"
        width = self.nesting.widths[int((~torch.isfinite(widths)).nonzero()[0])]
        return f"the loss is not finite at width {width}; raise the temperature or lower the learning rate"
