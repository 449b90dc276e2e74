"""sentence-transformers' trainer with three things changed: the nested loss logs every width, checkpoints appear
whole or not at all, and training state is safetensors and JSON instead of pickles."""

import os
import shutil
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from matryo.core.files import fsync_file, fsync_folder
from matryo.encoders.folder import disk_errors
from matryo.training.state import load_state, random_state, save_state, set_random_state

STAGING = ".unfinished"
KEPT = 2


class NestedTrainer(SentenceTransformerTrainer):
    """Trains a NestedObjective. Only what differs from the trainer underneath is here."""

    staging: Path | None = None
    # Narrower than the trainer underneath declares them, and there from the first step on.
    loss: Any
    optimizer: Any
    lr_scheduler: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The nested loss; the loss of each width goes to the log."""
        features, labels = self.collect_features(inputs)
        if model is self.model_wrapped and self.loss.model is not model:
            self.loss = self.override_model_in_loss(self.loss, model)  # type: ignore[arg-type]
        loss, widths = self.loss(features, labels)
        named = zip(self.loss.nesting.widths, widths, strict=True)
        self.track_loss_components({f"loss@{width}": value for width, value in named})
        return (loss, {}) if return_outputs else loss

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Our own card is written at the end; theirs would sample and tokenise the data first."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The length of the gradient for the log; torch has none for sparse gradients, whose values alone count."""
        sparse = [p.grad._values() for p in model.parameters() if p.grad is not None and p.grad.is_sparse]
        parent: Any = super()._get_grad_norm
        return sum(v.square().sum() for v in sparse).sqrt() if sparse else parent(model, grad_norm)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint aside, make it durable, then give it its name; keep the two newest and the best."""
        folder = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.staging = folder / STAGING
        try:
            with disk_errors(f"saving {folder / name}"):
                shutil.rmtree(self.staging, ignore_errors=True)
                self.staging.mkdir(parents=True)
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step:
                    best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                    self.state.best_model_checkpoint = str(best)
                    self.state.save_to_json(str(self.staging / name / "trainer_state.json"))
                for path in (p for p in (self.staging / name).rglob("*") if p.is_file()):
                    fsync_file(path)
                shutil.rmtree(folder / name, ignore_errors=True)
                os.replace(self.staging / name, folder / name)
                fsync_folder(folder)
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging = None
        for old in checkpoints(folder)[:-KEPT]:
            if str(old) != self.state.best_model_checkpoint:
                shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        self.model.save_pretrained(str(folder), create_model_card=False)
        own = {key: value for key, value in self.loss.state_dict().items() if not key.startswith("model.")}
        save_state(folder, "objective", own)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        save_state(folder, "optimizer", self.optimizer.state_dict())
        save_state(folder, "scheduler", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self.loss.load_state_dict(load_state(folder, "objective"), strict=False)
        self.optimizer.load_state_dict(load_state(folder, "optimizer"))
        self.lr_scheduler.load_state_dict(load_state(folder, "scheduler"))

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        save_state(Path(output_dir), f"random_{self.args.process_index}", random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(load_state(Path(checkpoint), f"random_{self.args.process_index}"))


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))
