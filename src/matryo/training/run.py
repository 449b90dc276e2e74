"""One training run, from a checked configuration to a model folder."""

import json
import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import transformers
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from matryo.core.errors import DamagedError, InputError
from matryo.core.files import digest, storage_errors, write_text
from matryo.core.prefix import Nesting
from matryo.core.records import Pairs, read_pairs
from matryo.encoders import Model, load
from matryo.encoders.folder import CARD, disk_errors, module_types, write_card
from matryo.encoders.model import Card
from matryo.encoders.sentence_transformer import SentenceTransformerEncoder, check_device
from matryo.encoders.static import StaticEncoder
from matryo.training.card import int8_scales, score_rows, versions, write_readme
from matryo.training.config import TrainConfig
from matryo.training.dev import DevEvaluator, Encode, read_dev
from matryo.training.objective import NestedObjective
from matryo.training.row_adam import RowAdam
from matryo.training.static import BagCollator, TokenBags, make_row_sparse, new_static
from matryo.training.trainer import NestedTrainer, checkpoints

CALIBRATION = 4096
"""Positives encoded at the end to fit the int8 scales."""


@dataclass(frozen=True)
class Step:
    """What a run reports while it goes on."""

    step: int
    steps: int
    losses: dict[int, float] = field(default_factory=dict)
    """Mean loss at each width since the last report; empty between reports."""
    scores: dict[str, float] = field(default_factory=dict)
    """Dev scores, `width_<d>` and `mean`; empty unless just measured."""


def train(config: TrainConfig, *, resume: bool = False, report: Callable[[Step], None] | None = None) -> Model:
    """Train a nested model and write it to `config.out`.

    The objective is Matryoshka Representation Learning (arXiv 2205.13147), equation 1, with InfoNCE. The trainer is
    sentence-transformers'. Checkpoints are whole or absent; the two newest and the best are kept until the run ends.

    Args:
        config: what to train.
        resume: go on from the newest checkpoint in `config.out`. The result is bit-equal to an uninterrupted run on the
            same machine with the same number of threads. A finished run is simply loaded.
        report: called with a Step after every step and every measurement.

    Returns:
        The trained model, loaded from the folder that was written.

    Raises:
        InputError: data, widths or an `out` that do not fit; nothing has been written then.
        KeyboardInterrupt: Ctrl-C; a checkpoint of the last finished step is on disk. A second Ctrl-C stops at once.
        StorageError: the disk refused; earlier checkpoints are whole.
    """
    run = _Run(config, resume)
    if run.finished:
        return load(config.out)
    with _quiet(), _graceful_stop() as stop:
        run.fit(report, stop)
        if stop.is_set():
            raise KeyboardInterrupt
        with disk_errors(f"writing {config.out}"):
            run.finish()
    return load(config.out)


class _Run:
    def __init__(self, config: TrainConfig, resume: bool) -> None:
        self.config = config
        self.work = config.out / "checkpoints"
        self.finished = self._check_out(resume)
        if self.finished:
            return
        self.pairs = read_pairs(config.pairs)
        if len(self.pairs) < 2:
            raise InputError(f"{config.pairs}: contrastive training needs at least 2 pairs, got {len(self.pairs)}")
        dev = read_dev(config.dev, config.dev_split) if config.dev else None
        self.model = self._model()
        self.static = len(self.model) == 1 and hasattr(self.model[0], "embedding")
        self.nesting = config.nesting(int(self.model.get_embedding_dimension() or 0))
        self._check_fit()
        self.dev = dev and DevEvaluator(dev, self.nesting, config.metric, self._encode)
        self.identity = {"config": _plain(config), "pairs": {"rows": len(self.pairs), "blake2b": digest(config.pairs)}}
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
            return new_static(static, self.pairs, config.seed).to(config.device or "cpu")
        if Path(config.base).is_dir():
            module_types(Path(config.base))
        model: SentenceTransformer = SentenceTransformerEncoder.load(config.base, config.device).model
        return model

    def _check_fit(self) -> None:
        given = self.config.temperature
        if isinstance(given, tuple) and len(given) != len(self.nesting):
            raise InputError(f"temperature: {len(given)} values for {len(self.nesting)} widths")
        best = self.config.best
        if isinstance(best, int) and best not in self.nesting.widths:
            raise InputError(f"best: width {best} is not among the trained widths {list(self.nesting.widths)}")
        if isinstance(best, int) and self.dev_missing:
            raise InputError(f"best={best} needs a dev set to measure on; give dev")

    @property
    def dev_missing(self) -> bool:
        return self.config.dev is None

    def _check_identity(self, resume: bool) -> None:
        """A resumed run must be the run that was interrupted, or its result would belong to neither."""
        path = self.work / "run.json"
        text = json.dumps(self.identity, indent=2)
        if resume:
            try:
                before = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise DamagedError(f"{path} cannot be read ({error}); choose another folder and start anew") from error
            if before != json.loads(text):
                changed = [k for k, v in self.identity["config"].items() if before["config"].get(k) != v] or ["pairs"]
                raise InputError(f"cannot resume {self.config.out}: {', '.join(changed)} changed since it was started")
            return
        with storage_errors(f"creating {self.work}"):
            self.work.mkdir(parents=True, exist_ok=True)
        write_text(path, text)

    def fit(self, report: Callable[[Step], None] | None, stop: threading.Event) -> None:
        """Run the trainer, from the newest checkpoint if there is one, and put the best weights into the model."""
        config = self.config
        default = 0.065 if self.static else 0.05
        objective = NestedObjective(self.model, self.nesting, config.temperature or default, config.symmetric)
        dataset, collate = self.dataset, cast(Any, self.collator)
        optimizers: Any = (None, None)
        if self.static:
            make_row_sparse(self.model)
            optimizers = (RowAdam(self.model.parameters(), lr=config.rate(True)), None)
        trainer = NestedTrainer(
            model=self.model,
            args=self._arguments(len(dataset)),
            train_dataset=dataset,
            loss=objective,
            evaluator=self.dev or None,
            data_collator=collate,
            optimizers=optimizers,
            callbacks=[_Reporter(report, stop)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        found = checkpoints(self.work)
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
        if trainer.state.best_model_checkpoint and config.best != "last" and not stop.is_set():
            trainer._load_from_checkpoint(trainer.state.best_model_checkpoint)
        self.steps = trainer.state.global_step

    def _data(self) -> tuple[Dataset, BagCollator | None]:
        pairs = self.pairs
        columns = {"anchor": pairs.anchors, "positive": pairs.positives}
        columns |= {f"negative_{n}": texts for n, texts in enumerate(pairs.negatives, start=1)}
        label = {"label": np.unique(pairs.groups, return_inverse=True)[1]} if pairs.groups else {}
        if not self.static:
            return Dataset.from_dict({**columns, **label}), None
        tokenizer: Any = self.model[0].tokenizer
        bags = {name: TokenBags(tokenizer, texts, f"{self.config.pairs}: {name}") for name, texts in columns.items()}
        return Dataset.from_dict({name: range(len(pairs)) for name in columns} | label), BagCollator(bags)

    def _arguments(self, rows: int) -> SentenceTransformerTrainingArguments:
        config = self.config
        an_epoch = -(-rows // config.batch_size)
        steps = min(an_epoch * config.epochs, config.max_steps or an_epoch * config.epochs)
        often = {"steps": config.save_steps} if config.save_steps else {"epoch": None}
        strategy = next(iter(often))
        ranked = self.dev is not None and config.best != "last"
        return SentenceTransformerTrainingArguments(
            output_dir=str(self.work),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.rate(self.static),
            warmup_steps=round(config.warmup * steps),
            weight_decay=config.weight_decay,
            # Sparse gradients have no global norm to clip by; Adam bounds each row's step anyway.
            max_grad_norm=0.0 if self.static else 1.0,
            lr_scheduler_type="linear",
            seed=config.seed,
            bf16=config.precision == "bfloat16",
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
        encode = self._encode(self.model)
        _declare_widths(self.model, self.nesting)
        self.model.save_pretrained(str(out), create_model_card=False)
        for weights in out.rglob("*.safetensors"):
            # safetensors lets only the owner read; a server is often someone else.
            weights.chmod((out / "modules.json").stat().st_mode)
        card = Card(
            name=out.name,
            nesting=self.nesting,
            scores=tuple(score_rows(self.dev, encode, self.nesting)) if self.dev else (),
            int8_scales=int8_scales(encode(_spread(self.pairs, CALIBRATION)), self.nesting),
            training={**self.identity, "steps": self.steps, "versions": versions()},
        )
        if self.static:
            # Static folders have no config.json of their own; this is the key that servers read the widths from.
            serving = {"is_matryoshka": True, "matryoshka_dimensions": list(self.nesting.widths)}
            write_text(out / "config.json", json.dumps(serving, indent=2) + "\n")
        write_readme(out, card, config)
        write_card(out, card)
        shutil.rmtree(self.work)


def _declare_widths(model: SentenceTransformer, nesting: Nesting) -> None:
    """Put the widths where vLLM and SGLang look: the backbone's config.json."""
    backbone = getattr(model[0], "auto_model", None)
    if backbone is not None:
        backbone.config.is_matryoshka = True
        backbone.config.matryoshka_dimensions = list(nesting.widths)


def _spread(pairs: Pairs, most: int) -> list[str]:
    """Positives at even distances through the file."""
    return pairs.positives[:: max(1, len(pairs) // most)][:most]


def _plain(config: TrainConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(config.model_dump_json(exclude={"out"}))
    return plain


def _best_key(best: int | str) -> str:
    return "mean" if best == "mean" else f"width_{best}"


class _Reporter(TrainerCallback):
    """Passes progress on, and turns a Ctrl-C into a checkpoint and an orderly end after the step."""

    def __init__(self, report: Callable[[Step], None] | None, stop: threading.Event) -> None:
        self.report, self.stop = report, stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.report:
            self.report(Step(state.global_step, state.max_steps))
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        losses = {int(k.removeprefix("loss@")): v for k, v in (logs or {}).items() if k.startswith("loss@")}
        if self.report and losses:
            self.report(Step(state.global_step, state.max_steps, losses=losses))

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        named = {key.removeprefix("eval_"): value for key, value in more["metrics"].items()}
        scores = {key: value for key, value in named.items() if key == "mean" or key.startswith("width_")}
        if self.report:
            self.report(Step(state.global_step, state.max_steps, scores=scores))


@contextmanager
def _graceful_stop() -> Iterator[threading.Event]:
    """The first Ctrl-C sets an event instead of raising in the middle of a step; the second raises."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress is ours to report: keep the trainer's own notes out of the way."""
    noise: Any = transformers.logging
    level = noise.get_verbosity()
    own = logging.getLogger("sentence_transformers")
    before = own.level
    noise.set_verbosity_error()
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noise.set_verbosity(level)
        own.setLevel(before)
