"""The paper's first experiment at the scale of one core: MRL, MRL-E and one fixed-feature model per width.

    python experiments/images/tiny.py DATA --scratch SCRATCH [--models mrl ff-1024 ...] [--seeds 3] [--until HH:MM]

DATA holds train.parquet and val.parquet (image, label). Every model has the same backbone, recipe and epochs. A
finished model is one row of results/tiny.jsonl and is not trained again; one that was stopped goes on from its last
epoch.
SCRATCH keeps decoded pictures, model folders and the vectors of both splits (float16 .npy) for later measurements.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

from matryo.classify import LinearHeads
from matryo.core.labelled import LabelledTask
from matryo.encoders.images import Pictures, read_pictures
from matryo.encoders.images.network import NetworkConfig
from matryo.evaluation.labelled import evaluate_labelled
from matryo.training import load_head
from matryo.training.images import Epoch, ImageConfig, train_images

WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128],
    "depths": [1, 1, 1],
    "layer_type": "bottleneck",
}
RESULTS = Path(__file__).parent / "results" / "tiny.jsonl"


KINDS = ("mrl", "mrl-e", *(f"ff-{width}" for width in WIDTHS))


def config_of(kind: str, seed: int, options: argparse.Namespace) -> ImageConfig:
    widths = (int(kind.removeprefix("ff-")),) if kind.startswith("ff-") else WIDTHS
    return ImageConfig(
        out=options.scratch / f"{kind}-{seed}",
        network=NetworkConfig(BACKBONE, width=widths[-1], stem="half"),
        widths=widths,
        tied=kind == "mrl-e",
        epochs=options.epochs,
        label_smoothing=0.1,
        precision=options.precision,
        seed=seed,
    )


def splits(options: argparse.Namespace) -> tuple[Pictures, Pictures]:
    """Training pictures and val, decoded once and kept in SCRATCH."""
    train = read_pictures(options.data / "train.parquet", 32, cache=options.scratch)
    return train, read_pictures(options.data / "val.parquet", 32, classes=train.classes, cache=options.scratch)


def task_of(train: Pictures, val: Pictures) -> LabelledTask:
    return LabelledTask("tiny ImageNet", *([p.classes[n] for n in p.labels] for p in (train, val)))


def measure(config: ImageConfig, train: Pictures, val: Pictures, scratch: Path) -> dict[str, object]:
    model = train_images(config, train, resume=True)
    vectors = {}
    for name, part in (("train", train), ("val", val)):
        vectors[name] = model.encoder.vectors(part.pixels, 500, False)
        np.save(scratch / f"{config.out.name}-{name}.npy", vectors[name].astype(np.float16))
    found = evaluate_labelled(
        (vectors["train"], vectors["val"]), task_of(train, val), config.widths, baselines=(), probe=False,
        heads=LinearHeads.of(*load_head(config.out)),
    )  # fmt: skip
    metrics = ("head top-1", "1-NN", "mAP@10")
    return {metric: {row.width: row.value for row in found.select(metric)} for metric in metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=KINDS, default=KINDS, metavar="MODEL", help=", ".join(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--until", help="stop after the epoch that ends past this time of day, HH:MM")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.results.open()] if options.results.is_file() else []
    done = {(row["model"], row["seed"], row["epochs"]) for row in rows}
    train, val = splits(options)

    def report(said: Epoch) -> None:
        losses = " ".join(f"{width}:{loss:.3f}" for width, loss in said.losses.items())
        print(f"  epoch {said.epoch}/{said.epochs} {said.seconds:.0f} s {losses}", flush=True)
        if options.until and time.strftime("%H:%M") >= options.until:
            raise SystemExit("stopped; the same command goes on")

    for seed, kind in product(range(options.seeds), options.models):
        if (kind, seed, options.epochs) in done:
            continue
        print(kind, seed, flush=True)
        config, began = config_of(kind, seed, options), time.perf_counter()
        train_images(config, train, resume=True, report=report)
        spent = time.perf_counter() - began
        row = {"model": kind, "seed": seed, "epochs": options.epochs, "last_run_s": round(spent, 1)}
        row |= measure(config, train, val, options.scratch)
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
