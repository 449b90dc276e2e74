"""The paper's cheap ways to short vectors, on the vectors that tiny.py kept: prefix, random features, SVD, PCA.

    python experiments/images/baselines.py DATA --scratch SCRATCH [--model ff-1024] [--seeds 3]

All are made from one model of full width; SVD and PCA are fitted on the training pictures only. Per width: 1-NN and
mAP@10 by cosine among the training pictures, and top-1 of a linear classifier trained on the short training vectors.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tiny import WIDTHS, neighbours
from torch.nn import functional as F

from matryo.core.prefix import truncate
from matryo.encoders.images import read_pictures

RESULTS = Path(__file__).parent / "results" / "baselines.jsonl"
WAYS = ("prefix", "random", "svd", "pca")


def shortener(way: str, train_ND: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(D, D) columns, best first, and the (D,) mean to take off; a width takes the first columns."""
    D = train_ND.shape[1]
    nothing = np.zeros(D, np.float32)
    if way == "prefix":
        return np.eye(D, dtype=np.float32), nothing
    if way == "random":
        return np.eye(D, dtype=np.float32)[:, np.random.default_rng(seed).permutation(D)], nothing
    mean = train_ND.mean(0) if way == "pca" else nothing
    centred = (train_ND - mean).astype(np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return axes[:, ::-1].astype(np.float32), mean


def probe(train_ND: np.ndarray, labels_N: np.ndarray, val_QD: np.ndarray, want_Q: np.ndarray) -> float:
    """Top-1 of a linear classifier on standardised features: cross-entropy, weight decay 1e-4, 100 steps of L-BFGS."""
    mean, std = train_ND.mean(0), train_ND.std(0) + 1e-6
    x, y = torch.from_numpy((train_ND - mean) / std), torch.from_numpy(labels_N)
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    said = (torch.from_numpy((val_QD - mean) / std) @ weight + bias).argmax(1).numpy()
    return float((said == want_Q).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", default="ff-1024")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.results.open()] if options.results.is_file() else []
    done = {(row["model"], row["seed"], row["way"], row["width"]) for row in rows}
    train = read_pictures(options.data / "train.parquet", 32, cache=options.scratch)
    val = read_pictures(options.data / "val.parquet", 32, classes=train.classes, cache=options.scratch)
    for seed in range(options.seeds):
        full = {
            split: np.load(options.scratch / f"{options.model}-{seed}-{split}.npy").astype(np.float32)
            for split in ("train", "val")
        }
        for way in WAYS:
            columns, mean = shortener(way, full["train"], seed)
            for width in options.widths:
                if (options.model, seed, way, width) in done:
                    continue
                short = {split: (x - mean) @ columns[:, :width] for split, x in full.items()}
                nearest, precision = neighbours(
                    truncate(short["train"], width), train.labels, truncate(short["val"], width), val.labels
                )
                row = {"model": options.model, "seed": seed, "way": way, "width": width, "1nn": nearest}
                row |= {"map@10": precision, "probe": probe(short["train"], train.labels, short["val"], val.labels)}
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
