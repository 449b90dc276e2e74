"""sentence-transformers: one line of a training script changes, the loss."""

import tempfile

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from debian import WIDTHS, found, new_model, pairs
from matryo.losses import nested_info_nce
from matryo.training.modules import NestedLoss

anchors, positives = pairs()
model = new_model(anchors + positives)
# before: loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), WIDTHS)
loss = NestedLoss(model, nested_info_nce, WIDTHS, temperature=0.05)

with tempfile.TemporaryDirectory() as folder:
    arguments = SentenceTransformerTrainingArguments(
        folder,
        num_train_epochs=5,
        per_device_train_batch_size=64,
        learning_rate=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = Dataset.from_dict({"anchor": anchors, "positive": positives})
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; found by width:", {width: found(model, width) for width in WIDTHS})
