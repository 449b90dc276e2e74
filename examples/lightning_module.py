"""Lightning: the loss is what `training_step` returns, and every width is logged."""

from typing import Any

import lightning
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.utils.data import DataLoader

import matryo as mt
from debian import WIDTHS, found, new_model, pairs
from matryo.losses import nested_info_nce


class Nested(lightning.LightningModule):
    """Trains a sentence-transformers model at several widths."""

    def __init__(self, model: SentenceTransformer, nesting: mt.Nesting) -> None:
        super().__init__()
        self.model, self.nesting = model, nesting
        self.losses: list[float] = []

    def training_step(self, batch: list[dict[str, Any]]) -> Tensor:
        embedded = [self.model(column)["sentence_embedding"] for column in batch]
        loss, values = nested_info_nce(*embedded, nesting=self.nesting, temperature=0.05, per_width=True)
        self.log_dict({f"loss@{w}": v for w, v in zip(self.nesting.widths, values, strict=True)}, batch_size=64)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


anchors, positives = pairs()
model = new_model(anchors + positives)


def collate(rows: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows to the features of both columns."""
    return [model.preprocess(list(texts)) for texts in zip(*rows, strict=True)]


data = DataLoader(list(zip(anchors, positives, strict=True)), batch_size=64, shuffle=True, collate_fn=collate)
module = Nested(model, mt.Nesting(WIDTHS))
trainer = lightning.Trainer(
    max_epochs=5,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, data)

losses = module.losses
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; found by width:", {width: found(model, width) for width in WIDTHS})
