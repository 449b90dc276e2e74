import json
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


@pytest.fixture(scope="session")
def row_files(pairs_file, debian_rows, tmp_path_factory) -> dict[str, Path]:
    """A file of every kind of rows that losses take: 200 rows each, or 120 labelled ones of three classes."""
    folder, rows = tmp_path_factory.mktemp("rows"), debian_rows[:200]
    classes = ("games", "libs", "net")
    made = {
        "triplets": [{**row, "negative": rows[(n + 7) % 200]["positive"]} for n, row in enumerate(rows)],
        "lists": [
            {**row, "negative": rows[(n + 7) % 200]["positive"], "negative_2": rows[(n + 9) % 200]["positive"]}
            for n, row in enumerate(rows)
        ],
        "scored": [
            {"sentence1": row["anchor"], "sentence2": rows[(n + n % 2 * 7) % 200]["positive"], "score": 1 - n % 2}
            for n, row in enumerate(rows)
        ],
        "labelled": [{"text": row["positive"], "label": classes[n % 3]} for n, row in enumerate(rows[:120])],
        "texts": [{"text": row["positive"]} for row in rows],
    }
    for name, content in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {"pairs": pairs_file} | {name: folder / f"{name}.jsonl" for name in made}


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
