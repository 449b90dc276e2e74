"""sentence-transformers' trainer with four things changed: nested losses log every width, checkpoints appear whole or
not at all, training state is safetensors and JSON instead of pickles, and processes average all gradients at once."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from matryo.core.files import fsync_file, fsync_folder
from matryo.core.prefix import Nesting
from matryo.encoders.folder import disk_errors
from matryo.training import processes
from matryo.training.data import NeighbourBatches, Teacher, WithoutDuplicates, batches_by_label, leaves_one
from matryo.training.rotation import FEWEST
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

    def __init__(
        self,
        *,
        no_duplicates: bool = False,
        neighbours: bool = False,
        teachers: Mapping[str, Teacher] | None = None,
        **options: Any,
    ) -> None:
        """Take the options of the trainer underneath, whether to keep texts from being in a batch twice, whether to
        make batches of neighbours where there is a teacher, and the teachers of data sets by their names."""
        self.no_duplicates, self.neighbours, self.teachers = no_duplicates, neighbours, dict(teachers or {})
        self.tallies: dict[str, Tensor] = {}
        super().__init__(**options)
        self.add_callback(_Epochs(self))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The nested loss; the loss of each width goes to the log."""
        name = inputs.pop("dataset_name", None)
        features, labels = self.collect_features(inputs)
        # Under DDP the bare model is called: see matryo.training.processes.
        wrapped = model is self.model_wrapped and not isinstance(model, DistributedDataParallel)
        if wrapped and self.loss.model is not model:
            self.loss = self.override_model_in_loss(self.loss, model)
        teacher = self.teachers.get(name or next(iter(self.loss.parts)))
        taught = teacher.take(inputs["row"]) if teacher else ()
        loss, found = self.loss(features, labels, name, self.state.global_step, taught)
        for depth, (nesting, values) in found.items():
            self._count(name, depth, values, nesting)
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, and with several processes the mean of their gradients."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if processes.count() > 1:
            processes.reduce_gradients(self.loss.parameters())
        return loss

    def _count(self, name: str | None, depth: int | None, values: Any, nesting: Nesting) -> None:
        """Add the losses of a step to what the next line of the log is made of: (2, L) sums and steps by name."""
        every = self.loss.nesting.widths
        places = [every.index(width) for width in nesting.widths]
        for code, losses in (values if isinstance(values, dict) else {None: values}).items():
            key = "/".join(part for part in (name, code, depth and f"depth {depth}") if part)
            tally = self.tallies.setdefault(key, torch.zeros(2, len(every), device=losses.device))
            tally[0, places] += losses
            tally[1, places] += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the mean loss at each width, of each data set, beside the whole loss."""
        if "loss" in logs and self.tallies:
            logs = dict(logs)
            # Every process took its batches from the same data sets, so all have the same names in the same order.
            sums = processes.total(torch.stack(list(self.tallies.values()))).tolist()
            for key, (losses, steps) in zip(self.tallies, sums, strict=True):
                for width, loss, count in zip(self.loss.nesting.widths, losses, steps, strict=True):
                    if count:
                        logs[f"{key}/loss@{width}" if key else f"loss@{width}"] = loss / count
            self.tallies = {}
        super().log(logs, start_time)

    def should_dataset_name_column_be_added(self, dataset: Any, args: Any, loss: Any) -> bool:
        """Every batch of several data sets says which one it is from."""
        return isinstance(dataset, DatasetDict)

    def get_batch_sampler(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """Batches without duplicates, or with several rows of a class, where the data set's loss asks for it; none of
        one row, where the loss compares rows."""
        datasets: Any = self.train_dataset
        names = [n for n, d in datasets.items() if d is dataset] if isinstance(datasets, DatasetDict) else []
        name = names[0] if names else next(iter(self.loss.parts))
        wanted = self.loss.parts[name].recipe
        if wanted.by_label:
            return batches_by_label(dataset, *args, **options)
        if self.no_duplicates and wanted.rows == "pairs":
            return WithoutDuplicates(dataset, *args, **options)
        options["drop_last"] |= leaves_one(len(dataset), options["batch_size"], wanted)
        if self.neighbours and wanted.other_rows and name in self.teachers:
            parts = self.teachers[name].neighbourhoods(max(FEWEST, 2 * options["batch_size"]))
            return NeighbourBatches(dataset, parts, *args, **options)
        return super().get_batch_sampler(dataset, *args, **options)

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> Any:
        loader = super()._build_dataloader(dataset, batch_size, dataset_kind)
        self.batches: Any = loader.batch_sampler
        return loader

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Our own card is written at the end; theirs would sample and tokenise the data first."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The length of the gradient for the log; torch has none for sparse gradients, whose values alone count."""
        sparse = [p.grad._values() for p in model.parameters() if p.grad is not None and p.grad.is_sparse]
        parent: Any = super()._get_grad_norm
        lengths = [torch.linalg.vector_norm(v) for v in sparse]
        return torch.linalg.vector_norm(torch.stack(lengths)) if lengths else parent(model, grad_norm)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint aside, make it durable, then give it its name; keep the two newest and the best.

        Every process writes its random state; all else, and the renaming, is the first one's.
        """
        folder = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.staging = folder / STAGING
        main = processes.is_main()
        try:
            with disk_errors(f"saving {folder / name}"):
                if main:
                    shutil.rmtree(self.staging, ignore_errors=True)
                    self.staging.mkdir(parents=True)
                processes.wait()
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step:
                    best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                    self.state.best_model_checkpoint = str(best)
                processes.wait()
                if main:
                    self._publish(self.staging / name, folder / name)
        finally:
            if main:
                shutil.rmtree(self.staging, ignore_errors=True)
            self.staging = None
        processes.wait()
        for old in checkpoints(folder)[:-KEPT] if main else []:
            if str(old) != self.state.best_model_checkpoint:
                shutil.rmtree(old)

    def _publish(self, staged: Path, folder: Path) -> None:
        """Make a written checkpoint durable and visible."""
        self.state.save_to_json(str(staged / "trainer_state.json"))
        for path in (p for p in staged.rglob("*") if p.is_file()):
            fsync_file(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staged, folder)
        fsync_folder(folder.parent)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        self.model.save_pretrained(str(folder), create_model_card=False)
        own = {key: value for key, value in self.loss.state_dict().items() if not key.startswith("model.")}
        save_state(folder, "objective", own)

    def restore(self, checkpoint: str) -> None:
        """Put the weights of a checkpoint, and what its losses had learned, back into the model."""
        self._load_from_checkpoint(checkpoint)
        self.loss.load_state_dict(load_state(Path(checkpoint), "objective"), strict=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
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


class _Epochs(TrainerCallback):
    """Tells the batch samplers which epoch it is. On a resumed run of several processes the trainer underneath does not
    reach them through the wrappers that skip and share out batches."""

    def __init__(self, trainer: NestedTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if hasattr(self.trainer.batches, "set_epoch"):
            self.trainer.batches.set_epoch(int(state.epoch or 0))


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))
