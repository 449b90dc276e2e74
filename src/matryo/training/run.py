"""One training run, from a checked configuration to a model folder."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers import TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from matryo.core.depths import DepthNesting, DepthSampler
from matryo.core.errors import DamagedError, InputError
from matryo.core.files import storage_errors, write_text
from matryo.core.prefix import Nesting
from matryo.core.sampling import WidthSampler
from matryo.encoders import Model, load
from matryo.encoders.folder import CARD, disk_errors, module_types, write_card
from matryo.encoders.layers import Layers
from matryo.encoders.model import Card
from matryo.encoders.sentence_transformer import SentenceTransformerEncoder, check_device
from matryo.encoders.static import StaticEncoder
from matryo.training import processes
from matryo.training.blend import blend_with_start, save_start
from matryo.training.card import int8_scales, score_rows, versions, write_readme
from matryo.training.config import TrainConfig
from matryo.training.data import (
    RowCollator,
    Rows,
    Teacher,
    batches,
    check_batches,
    paired,
    read_sets,
    spread,
    text_datasets,
    token_datasets,
)
from matryo.training.dev import DevEvaluator, Encode, read_dev
from matryo.training.distributed import check_agreement
from matryo.training.heads import describe, heads_of, save_heads
from matryo.training.lora import add_adapter, merged
from matryo.training.objective import NestedObjective, Part
from matryo.training.progress import Reporter, Step, graceful_stop, quiet, ran_out
from matryo.training.rotation import add_rotation
from matryo.training.row_adam import RowAdam
from matryo.training.static import make_row_sparse, new_static
from matryo.training.trainer import NestedTrainer, checkpoints

CALIBRATION = 4096
"""Texts encoded at the end to fit the int8 scales."""


def train(config: TrainConfig, *, resume: bool = False, report: Callable[[Step], None] | None = None) -> Model:
    """Train a nested model and write it to `config.out`.

    The objective is Matryoshka Representation Learning (arXiv 2205.13147), equation 1, with the losses that the
    configuration names. The trainer is sentence-transformers'. Checkpoints are whole or absent; the two newest and the
    best are kept until the run ends.

    Started by torchrun or `accelerate launch`, the processes share out each batch, average their gradients once a
    step, and the first one writes. All of them need the same files and the same `config.out`.

    Args:
        config: what to train.
        resume: go on from the newest checkpoint in `config.out`. The result is bit-equal to an uninterrupted run on the
            same machine with the same number of threads and processes. A finished run is simply loaded.
        report: called with a Step after every step and every measurement, on the first process.

    Returns:
        The trained model, loaded from the folder that was written.

    Raises:
        InputError: data, widths or an `out` that do not fit; nothing has been written then.
        KeyboardInterrupt: Ctrl-C; a checkpoint of the last finished step is on disk. A second Ctrl-C stops at once.
        StorageError: the disk refused; earlier checkpoints are whole.
        UnavailableError: another process of the run is gone.
    """
    # A new static encoder is trained on the CPU unless told otherwise.
    processes.join(config.device or ("cpu" if config.base is None else None))
    run = _Run(config, resume)
    if run.finished:
        return load(config.out)
    with processes.losses_of_others(), quiet(), graceful_stop() as stop:
        run.fit(report, stop)
        if stop.is_set():
            raise KeyboardInterrupt
        if processes.is_main():
            with disk_errors(f"writing {config.out}"):
                run.finish()
        processes.wait()
    return load(config.out)


class _Run:
    def __init__(self, config: TrainConfig, resume: bool) -> None:
        self.config = config
        self.work = config.out / "checkpoints"
        self.mixed = config.precision == "bfloat16"
        self.finished = self._check_out(resume)
        if self.finished:
            return
        processes.check_batch(config.batch_size)
        self.sets = read_sets(config.sets())
        dev = read_dev(config.dev, config.dev_split) if config.dev else None
        self.model = self._model()
        self.static = len(self.model) == 1 and hasattr(self.model[0], "embedding")
        self.nesting = config.nesting(int(self.model.get_embedding_dimension() or 0))
        self.depths = None if config.depths is None else config.depths.nesting(Layers(self.model).count, self.nesting)
        self._check_fit()
        self.dev = dev and DevEvaluator(dev, self.nesting, config.metric, self._encode)
        self.identity: dict[str, Any] = {"config": _plain(config)}
        if config.pairs:
            self.identity["pairs"] = self.sets[0].record()
        else:
            self.identity["data"] = {rows.name: rows.record() for rows in self.sets}
        if processes.count() > 1:
            self.identity["processes"] = processes.count()
        self.objective = self._objective()
        taught = self.sets if config.epochs else []
        self.teachers = {rows.name: Teacher(rows, self.mixed) for rows in taught if rows.config.teacher}
        self.dataset, self.collator = self._data()
        self._check_identity(resume)

    def _check_out(self, resume: bool) -> bool:
        out = self.config.out
        if (out / CARD).is_file():
            if resume:
                return True
            raise InputError(f"{out} already holds a trained model; choose another folder or remove it")
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; choose a folder")
        if checkpoints(self.work) and not resume:
            raise InputError(f"{out} holds an unfinished run; go on with --resume or choose another folder")
        if resume and not checkpoints(self.work):
            raise InputError(f"{out} holds no checkpoint to resume from; start without --resume")
        if out.is_dir() and not self.work.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} is not empty and not a run of ours; choose another folder")
        return False

    def _model(self) -> SentenceTransformer:
        config = self.config
        check_device(config.device)
        if config.base is None:
            static, before = config.static, checkpoints(self.work)
            if before:
                # The rows of the table that goes on are numbered by the tokeniser saved with it.
                static = static.model_copy(update={"tokenizer": before[-1] / "tokenizer.json"})
            # On the CPU unless told otherwise: its sparse steps are short.
            texts = [text for rows in self.sets for text in rows.texts]
            return new_static(static, texts, config.seed).to(config.device or "cpu")
        if Path(config.base).is_dir():
            module_types(Path(config.base))
        # A run that goes on loads the turned weights from its checkpoint.
        model = self._base(config.base, [] if checkpoints(self.work) else paired(self.sets))
        if config.lora is not None:
            with _seeded(config.seed):
                add_adapter(model, config.lora)
        return model

    def _base(self, base: str, columns: list[list[str]]) -> SentenceTransformer:
        """The base, turned by these texts; without texts, with the layers that turned weights go into."""
        config = self.config
        model: SentenceTransformer = SentenceTransformerEncoder.load(base, config.device).model
        if config.layers is not None:
            model = Layers(model).choose(config.layers)
        if config.rotate != "none":
            nesting = config.nesting(int(model.get_embedding_dimension() or 0))
            add_rotation(model, columns, config.rotate, nesting, config.seed, self.mixed)
        return model

    def _check_fit(self) -> None:
        best = self.config.best
        if isinstance(best, int) and best not in self.nesting.widths:
            raise InputError(f"best: width {best} is not among the trained widths {list(self.nesting.widths)}")
        if isinstance(best, int) and self.config.dev is None:
            raise InputError(f"best={best} needs a dev set to measure on; give dev")
        if self.static and self.config.mini_batch_size is not None:
            raise InputError("mini_batch_size saves activations, and a static encoder has none; leave it out")
        check_batches(self.sets, self.config.batch_size)
        if self._batches() < 1:
            raise InputError(
                f"several processes take whole batches only, and batch_size {self.config.batch_size} is more than the "
                f"{min(len(rows) for rows in self.sets)} rows of a data set; lower it"
            )

    def _batches(self) -> int:
        return batches(self.sets, self.config.batch_size, self.config.mixing, drop_last=processes.count() > 1)

    def _objective(self) -> NestedObjective:
        config = self.config
        with _seeded(config.seed):
            parts = {rows.name: self._part(rows) for rows in self.sets}
        keep = config.sample_widths
        sampler = None if keep is None else WidthSampler(self.nesting, keep, config.seed)
        depths: DepthNesting | DepthSampler | None = self.depths
        if self.depths is not None and config.depths is not None and config.depths.sample is not None:
            depths = DepthSampler(self.depths, config.depths.sample, config.seed)
        return NestedObjective(self.model, self.nesting, parts, sampler, config.mini_batch_size, depths, self.mixed)

    def _part(self, rows: Rows) -> Part:
        arguments = dict(rows.config.loss_args)
        if rows.config.loss == "info_nce":
            arguments.setdefault("temperature", 0.065 if self.static else 0.05)
        return Part(rows.config.loss, arguments, self.nesting, rows.config.weight, len(rows.classes))

    def _check_identity(self, resume: bool) -> None:
        """A resumed run must be the run that was interrupted, or its result would belong to neither."""
        found = [path.name for path in checkpoints(self.work)]
        check_agreement({**self.identity, "out": str(self.config.out.resolve()), "checkpoints": found})
        path = self.work / "run.json"
        text = json.dumps(self.identity, indent=2)
        if resume:
            try:
                before = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise DamagedError(f"{path} cannot be read ({error}); choose another folder and start anew") from error
            # What a version before ours did not know of was unset then.
            before["config"] = {key: before["config"].get(key) for key in self.identity["config"]} | before["config"]
            if before != json.loads(text):
                changed = [k for k, v in self.identity["config"].items() if before["config"].get(k) != v]
                changed += [k for k in self.identity.keys() | before.keys() if before.get(k) != self.identity.get(k)]
                changed = sorted({*changed} - {"config"})
                raise InputError(f"cannot resume {self.config.out}: {', '.join(changed)} changed since it was started")
            return
        if processes.is_main():
            with storage_errors(f"creating {self.work}"):
                self.work.mkdir(parents=True, exist_ok=True)
            if self.config.blend < 1:
                with disk_errors(f"keeping the weights to blend with in {self.work}"):
                    save_start(self.model, self.work)
            write_text(path, text)

    def fit(self, report: Callable[[Step], None] | None, stop: threading.Event) -> None:
        """Run the trainer, from the newest checkpoint if there is one, and put the best weights into the model."""
        config, found = self.config, checkpoints(self.work)
        self.steps = 0
        if config.epochs == 0:
            return
        optimizers: Any = (None, None)
        if self.static:
            make_row_sparse(self.model)
            groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
            extra = list(self.objective.losses.parameters())
            if extra:
                groups.append({"params": extra, "lr": config.head_rate(True)})
            optimizers = (RowAdam(groups, lr=config.rate(True)), None)
        trainer = NestedTrainer(
            model=self.model,
            args=self._arguments(),
            train_dataset=self.dataset,
            loss=self.objective,
            evaluator=self.dev or None,
            data_collator=cast(Any, self.collator),
            optimizers=optimizers,
            callbacks=[Reporter(report, stop, _best_key(config.best), config.patience)],
            no_duplicates=config.no_duplicates,
            neighbours=config.neighbours,
            teachers=self.teachers,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError(
                "this trainer keeps whole weights on every process (DDP); start it without FSDP and DeepSpeed, or use "
                "the losses in a loop of your own"
            )
        before = TrainerState.load_from_json(str(found[-1] / "trainer_state.json")) if found else None
        if before is not None and ran_out(before.log_history, _best_key(config.best), config.patience):
            # It had stopped early, and was interrupted while its folder was written.
            trainer.state = before
        else:
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
        if trainer.state.best_model_checkpoint and config.best != "last" and not stop.is_set():
            trainer.restore(trainer.state.best_model_checkpoint)
        self.steps = trainer.state.global_step

    def _data(self) -> tuple[Any, Any]:
        if self.static:
            return token_datasets(self.sets, self.model[0].tokenizer)
        collator = RowCollator(SentenceTransformerDataCollator(preprocess_fn=self.model.preprocess))
        return text_datasets(self.sets), collator if self.teachers else None

    def _arguments(self) -> SentenceTransformerTrainingArguments:
        config, an_epoch, several = self.config, self._batches(), processes.count() > 1
        extra = any(True for _ in self.objective.losses.parameters())
        steps = min(an_epoch * config.epochs, config.max_steps or an_epoch * config.epochs)
        often = {"steps": config.save_steps} if config.save_steps else {"epoch": None}
        strategy = next(iter(often))
        ranked = self.dev is not None and config.best != "last"
        return SentenceTransformerTrainingArguments(
            output_dir=str(self.work),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=config.batch_size,
            # One batch a step whatever the number of processes, of one data set, each taking its part of the rows.
            accelerator_config={"split_batches": several},
            dataloader_drop_last=several,
            multi_dataset_batch_sampler=config.mixing,
            learning_rate=config.rate(self.static),
            learning_rate_mapping={r"^losses\.": config.head_rate(self.static)} if extra else {},
            warmup_steps=round(config.warmup * steps),
            weight_decay=config.weight_decay,
            # Sparse gradients have no global norm to clip by; Adam bounds each row's step anyway.
            max_grad_norm=0.0 if self.static else 1.0,
            lr_scheduler_type="linear",
            seed=config.seed,
            bf16=self.mixed,
            use_cpu=self.model.device.type == "cpu",
            save_strategy=strategy,
            save_steps=config.save_steps or 500,
            save_total_limit=None,
            eval_strategy=strategy if self.dev else "no",
            eval_steps=config.save_steps,
            metric_for_best_model=f"eval_{_best_key(config.best)}" if ranked else None,
            greater_is_better=True if ranked else None,
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=self.model.device.type == "cuda",
        )

    def _encode(self, model: SentenceTransformer) -> Encode:
        """Full-width vectors of texts by the model as it is in training."""
        if self.static:
            # The numpy encoder gives the same vectors faster, and is what will serve them.
            module: Any = model[0]
            table = module.embedding.weight.detach().cpu().numpy()
            encoder: StaticEncoder | SentenceTransformerEncoder = StaticEncoder(module.tokenizer, table)
        else:
            encoder = SentenceTransformerEncoder(model)

        def encode(texts: list[str]) -> NDArray[np.float32]:
            return encoder.vectors(texts, 64, False)

        return encode

    def finish(self) -> None:
        """Write the model folder; `matryo.json` comes last, so that its presence means a whole model."""
        out, config = self.config.out, self.config
        if config.lora is not None:
            self.model = merged(self.model, self._base(str(config.base), []))
        if config.blend < 1:
            blend_with_start(self.model, self.work, config.blend)
        encode = self._encode(self.model)
        _declare_widths(self.model, self.nesting)
        self.model.save_pretrained(str(out), create_model_card=False)
        save_heads(out, heads_of(self.objective))
        for weights in out.rglob("*.safetensors"):
            # safetensors lets only the owner read; a server is often someone else.
            weights.chmod((out / "modules.json").stat().st_mode)
        card = Card(
            name=out.name,
            nesting=self.nesting,
            depths=None if self.depths is None else self.depths.depths,
            scores=tuple(score_rows(self.dev, encode, self.nesting)) if self.dev else (),
            depth_scores=tuple(self._depth_scores()),
            int8_scales=int8_scales(encode(spread(self.sets, CALIBRATION)), self.nesting),
            training={
                **self.identity,
                **describe(self.objective, self.sets),
                "steps": self.steps,
                "versions": versions(),
            },
        )
        if self.static:
            # Static folders have no config.json of their own; this is the key that servers read the widths from.
            serving = {"is_matryoshka": True, "matryoshka_dimensions": list(self.nesting.widths)}
            write_text(out / "config.json", json.dumps(serving, indent=2) + "\n")
        write_readme(out, card, config)
        write_card(out, card)
        shutil.rmtree(self.work)

    def _depth_scores(self) -> list[dict[str, Any]]:
        """Dev scores of every width at the depths below the last, at the widths trained there."""
        if self.depths is None or not self.dev:
            return []
        encoder = SentenceTransformerEncoder(self.model)
        return [
            {**row, "depth": depth}
            for depth, nesting in zip(self.depths.depths[:-1], self.depths.nestings, strict=False)
            for row in score_rows(self.dev, self._encode(encoder.at(depth).model), nesting, ("float32",))
        ]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is made here starts from the seed alone: not from what was drawn before, nor by which process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _declare_widths(model: SentenceTransformer, nesting: Nesting) -> None:
    """Put the widths where vLLM and SGLang look: the backbone's config.json."""
    backbone = getattr(model[0], "auto_model", None)
    if backbone is not None:
        backbone.config.is_matryoshka = True
        backbone.config.matryoshka_dimensions = list(nesting.widths)


def _plain(config: TrainConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(config.model_dump_json(exclude={"out"}))
    return plain


def _best_key(best: int | str) -> str:
    return "mean" if best == "mean" else f"width_{best}"
