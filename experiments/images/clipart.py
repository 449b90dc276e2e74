"""Two towers on pictures and their titles: retrieval both ways at every width.

    python experiments/images/clipart.py DATA --scratch SCRATCH [--seeds 1] [--loss info_nce]

DATA holds train.parquet and test.parquet (image, text). A test text that several pictures have counts as found with any
of them. One row per finished model to results/clipart.jsonl, which is not trained again.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from tiny import BACKBONE

from matryo.encoders.images import read_pictures
from matryo.encoders.images.network import NetworkConfig
from matryo.training.images import Epoch
from matryo.training.towers import TowerConfig, Towers, train_towers

WIDTHS = (8, 16, 32, 64, 128, 256)
RESULTS = Path(__file__).parent / "results" / "clipart.jsonl"


def recall(asked_QD: np.ndarray, items_ND: np.ndarray, wanted_Q: np.ndarray, owns_N: np.ndarray) -> dict[str, float]:
    """Share of queries with an item of theirs among the first 1, 5 and 10; equal scores in the order of the rows."""
    order_QN = np.argsort(-(asked_QD @ items_ND.T), axis=1, kind="stable")
    hits_QN = owns_N[order_QN] == wanted_Q[:, None]
    return {f"R@{k}": float(hits_QN[:, :k].any(1).mean()) for k in (1, 5, 10)}


def measured(towers: Towers, pixels: np.ndarray, texts: list[str]) -> dict[str, object]:
    names, numbers = np.unique(np.array(texts, dtype=object), return_inverse=True)
    found: dict[str, object] = {}
    for width in WIDTHS:
        images, words = towers.image.encode(pixels, width=width), towers.text.encode(list(names), width=width)
        found[str(width)] = {
            "image to text": recall(images, words, numbers, np.arange(len(names))),
            "text to image": recall(words, images, np.arange(len(names)), numbers),
        }
    return {"pictures": len(texts), "texts": len(names), "recall": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--loss", default="info_nce")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.results.open()] if options.results.is_file() else []
    done = {(row["loss"], row["seed"], row["epochs"], row["size"]) for row in rows}
    pictures, texts = {}, {}
    for split in ("train", "test"):
        file = options.data / f"{split}.parquet"
        pictures[split] = read_pictures(file, options.size, cache=options.scratch)
        texts[split] = parquet.read_table(file, columns=["text"])["text"].to_pylist()

    def report(said: Epoch) -> None:
        print(
            f"  epoch {said.epoch} {said.seconds:.1f} s", {k: round(v, 3) for k, v in said.losses.items()}, flush=True
        )

    for seed in range(options.seeds):
        if (options.loss, seed, options.epochs, options.size) in done:
            continue
        network, began = NetworkConfig(BACKBONE, width=WIDTHS[-1], size=options.size, stem="half"), time.perf_counter()
        out = options.scratch / f"clipart-{options.loss}-{seed}-{began:.0f}"
        config = TowerConfig(out, network, widths=WIDTHS, loss=options.loss, epochs=options.epochs, seed=seed)
        towers = train_towers(config, pictures["train"], texts["train"], report)
        row = {"loss": options.loss, "seed": seed, "epochs": options.epochs, "size": options.size}
        row |= {"seconds": round(time.perf_counter() - began, 1)}
        row |= measured(towers, pictures["test"].pixels, texts["test"])
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
