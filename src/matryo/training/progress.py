"""What a run reports while it goes on, and how it is asked to stop."""

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import TrainerCallback

from matryo.training import processes


@dataclass(frozen=True)
class Step:
    """What a run reports while it goes on."""

    step: int
    steps: int
    losses: dict[int, float] = field(default_factory=dict)
    """Mean loss at each width since the last report; empty between reports."""
    scores: dict[str, float] = field(default_factory=dict)
    """Dev scores, `width_<d>` and `mean`; empty unless just measured."""
    data: str | None = None
    """Of several data sets, or of several codes, the one whose losses these are."""


class Reporter(TrainerCallback):
    """Passes progress on, turns a Ctrl-C into a checkpoint and an orderly end after the step, and stops early."""

    def __init__(
        self, report: Callable[[Step], None] | None, stop: threading.Event, key: str, patience: int | None
    ) -> None:
        self.report = report if processes.is_main() else None
        self.stop, self.key, self.patience = stop, key, patience

    def _say(self, step: Step) -> None:
        if self.report:
            self.report(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._say(Step(state.global_step, state.max_steps))
        # All processes stop after the same step, or they would wait for each other for ever.
        if processes.any_of(self.stop.is_set(), args.device):
            self.stop.set()
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        found: dict[str | None, dict[int, float]] = {}
        for key, value in (logs or {}).items():
            before, at, width = key.rpartition("loss@")
            if at:
                found.setdefault(before.removesuffix("/") or None, {})[int(width)] = value
        for data, losses in found.items():
            self._say(Step(state.global_step, state.max_steps, losses=losses, data=data))

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        named = {key.removeprefix("eval_"): value for key, value in more["metrics"].items()}
        scores = {key: value for key, value in named.items() if key == "mean" or key.startswith("width_")}
        self._say(Step(state.global_step, state.max_steps, scores=scores))
        if ran_out(state.log_history, self.key, self.patience):
            control.should_training_stop = True


def ran_out(history: list[dict[str, float]], key: str, patience: int | None) -> bool:
    """Whether so many measurements have passed since the best one.

    Read off the log, which is saved with every checkpoint, so that a resumed run stops where it would have stopped.
    """
    scores = [logged[f"eval_{key}"] for logged in history if f"eval_{key}" in logged]
    return patience is not None and bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= patience


@contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """The first Ctrl-C sets an event instead of raising in the middle of a step; the second raises.

    With several processes the second does nothing: torchrun passes the one it gets on to processes that had it already.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        if processes.count() == 1:
            signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Progress is ours to report: keep the trainer's own notes out of the way."""
    noise: Any = transformers.logging
    level, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    own = logging.getLogger("sentence_transformers")
    before = own.level
    noise.set_verbosity_error()
    if not sys.stderr.isatty():
        noise.disable_progress_bar()
    own.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # accelerate names an option of DDP that newer torch has renamed.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            yield
    finally:
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()
        own.setLevel(before)
