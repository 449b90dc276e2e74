from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from matryo.training import StaticConfig, TrainConfig, train


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-equal results are promised for the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(pairs_file: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run of 10 steps on a tiny static encoder, with a checkpoint every second step; options change it."""

    def make(out: str = "model", **options) -> TrainConfig:
        small = {"static": StaticConfig(width=32, vocabulary=500), "epochs": 2, "batch_size": 40, "save_steps": 2}
        if "base" in options:
            del small["static"]
        return TrainConfig(**{"pairs": pairs_file, "out": tmp_path / out, **small, **options})

    return make


@pytest.fixture
def interrupted(config) -> Callable[..., TrainConfig]:
    """A run that an exception ended after step 5; its checkpoints of steps 2 and 4 are there."""

    class StoppedError(Exception):
        pass

    def stop(step) -> None:
        if step.step == 5:
            raise StoppedError

    def make(**options) -> TrainConfig:
        made = config(**options)
        with pytest.raises(StoppedError):
            train(made, report=stop)
        return made

    return make
