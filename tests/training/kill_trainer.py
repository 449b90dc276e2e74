"""Kill a training process again and again, resume it, and compare the end with an uninterrupted run.

    python kill_trainer.py PAIRS DEV FOLDER ROUNDS SEED

One process imports everything once and forks a trainer per attempt; the parent kills it with SIGKILL at a random
moment, looks at what is there and starts it again. Writes one line of JSON to standard output.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch

import matryo as mt
from matryo.training import StaticConfig, TrainConfig, train
from matryo.training.state import load_state
from matryo.training.trainer import STAGING, checkpoints

ALLOWED = (".json", ".safetensors", ".txt", ".md", ".svg", ".tmp")
STATES = ("optimizer", "scheduler", "objective", "random_0")


def start(config: TrainConfig) -> int:
    """The process id of a fresh trainer, which goes on from a checkpoint if there is one."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        train(config, resume=bool(checkpoints(config.out / "checkpoints")))
        status = 0
    finally:
        os._exit(status)


def attempt(config: TrainConfig, after: float | None) -> bool:
    """Run a trainer, kill it after so many seconds; whether it was still running then."""
    child = start(config)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the trainer failed; its traceback is above")
    return os.WIFSIGNALED(status)


def look(config: TrainConfig) -> None:
    """Every visible checkpoint loads, and nothing is a pickle.

    What a checkpoint is written in is never read again, and the libraries that write there name temporary files as they
    like; its finished files are looked at when it gets its name.
    """
    for path in config.out.rglob("*"):
        assert STAGING in path.parts or path.is_dir() or path.suffix in ALLOWED, path
    for checkpoint in checkpoints(config.out / "checkpoints")[-1:]:
        mt.load(checkpoint).encode(["mail"])
        for name in STATES:
            load_state(checkpoint, name)


def result(config: TrainConfig) -> dict[str, bytes]:
    return {name: (config.out / name).read_bytes() for name in ("model.safetensors", "tokenizer.json", "matryo.json")}


def main(pairs: Path, dev: Path, folder: Path, rounds: int, seed: int) -> None:
    def config(name: str) -> TrainConfig:
        static = StaticConfig(width=32, vocabulary=500)
        return TrainConfig(
            pairs=pairs, dev=dev, out=folder / name / "model", static=static, epochs=4, batch_size=40, save_steps=3
        )

    torch.set_num_threads(1)
    began = time.perf_counter()
    attempt(config("whole"), None)
    took = time.perf_counter() - began
    expected = result(config("whole"))
    rng = random.Random(seed)
    kills, resumed = 0, 0
    n = 0
    # Where a machine was busier at first than later, runs end before they are killed: then there are more rounds.
    while n < rounds or (n < 4 * rounds and (kills < rounds or resumed < rounds)):
        made = config(f"round-{n}")
        for _ in range(3):
            if (made.out / "matryo.json").is_file():
                break
            resumed += bool(checkpoints(made.out / "checkpoints"))
            kills += attempt(made, rng.uniform(0.1, 0.9) * took)
            look(made)
        if not (made.out / "matryo.json").is_file():
            resumed += bool(checkpoints(made.out / "checkpoints"))
            attempt(made, None)
        found = result(made)
        different = [name for name in expected if found[name] != expected[name]]
        assert not different, f"round {n} ended differently: {different}"
        mt.load(made.out).encode(["mail"])
        n += 1
    sys.stdout.write(json.dumps({"kills": kills, "resumed": resumed}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
