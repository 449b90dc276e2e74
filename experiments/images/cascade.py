"""The cascade on the pictures of tiny.py: thresholds from one half of val, figures from the other.

    python experiments/images/cascade.py DATA --scratch SCRATCH [--models mrl mrl-e] [--seeds 3] [--heads fitted]

Heads are those of training, or fitted to the end on the vectors of the training pictures (`mt.AdaptiveClassifier.fit`
without heads), at --widths, each with the strength that is best for a fifth of those; fitting takes some minutes of one
core a seed (with OPENBLAS_NUM_THREADS=1), and is kept in SCRATCH.

The halves take turns, so every picture of val is measured once by thresholds that have not seen it. Cost counts every
head that was evaluated. Targets are given as what may be lost of the full head's accuracy on the calibration half. One
row per model, heads, seed and target to results/cascade.jsonl, with the full head's own accuracy on the same pictures
and that of the trained full head.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tiny import splits, task_of

import matryo as mt
from matryo.classify import LinearHeads, fit_heads
from matryo.core.prefix import truncate
from matryo.training import load_head

RESULTS = Path(__file__).parent / "results" / "cascade.jsonl"
LOST = (0.0, 0.002, 0.01, 0.03)
EMPTY = 1e-7
"""An axis with less than this share of what the first one holds is rounding (vectors are kept in float16)."""


def halves(vectors: np.ndarray, labels: list[str]) -> list[tuple[np.ndarray, list[str]]]:
    """The two halves of a set, in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.array_split(order, 2)
    return [(vectors[part], [labels[n] for n in part]) for part in parts]


def measured(heads: LinearHeads, parts: list[tuple[np.ndarray, list[str]]], lost: float) -> dict[str, float]:
    """Accuracy and cost over both halves: of the cascade, and of the full head."""
    none = [float("inf")] * (len(heads.widths) - 1)
    full = mt.AdaptiveClassifier(heads, none)
    found = []
    for calibration, test in (parts, parts[::-1]):
        target = full.measure(*calibration).accuracy - lost
        made = mt.AdaptiveClassifier.fit(*calibration, calibration, heads=heads, target=target)
        seen, whole = made.measure(*test), full.measure(*test)
        found.append((seen.accuracy, whole.accuracy, seen.expected_width, seen.last_width))
    accuracy, whole, expected, last = np.mean(found, axis=0)
    return {"accuracy": accuracy, "full": whole, "expected_width": expected, "last_width": last}


def fitted(name: str, labels: list[str], options: argparse.Namespace) -> LinearHeads:
    """Heads fitted on the training vectors, from SCRATCH if they are there."""
    kept = options.scratch / f"{name}-heads-of-their-own-strength"
    if not kept.is_dir():
        vectors = np.load(options.scratch / f"{name}-train.npy").astype(np.float32)
        narrow = fit_heads(vectors, labels, options.widths[:-1], strength=None)
        weight, bias = fitted_whole(truncate(vectors, options.widths[-1]), labels)
        heads = LinearHeads(tuple(options.widths), narrow.classes, (*narrow.weights, weight), (*narrow.biases, bias))
        mt.AdaptiveClassifier(heads, [float("inf")] * (len(heads.widths) - 1)).save(kept)
    return mt.AdaptiveClassifier.load(kept).heads


def fitted_whole(units: np.ndarray, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The head of full width. Its penalty is on a length, so it is the same on axes turned to where the vectors lie: a
    layer of 1,024 outputs on 128 features leaves all other axes empty, and is fitted in an eighth of the time."""
    strengths, axes = np.linalg.eigh(units.T @ units)
    axes = axes[:, strengths > EMPTY * strengths[-1]]
    heads = fit_heads(units @ axes, labels, [axes.shape[1]], strength=None)
    return heads.weights[0] @ axes.T, heads.biases[0]


def accuracy(heads: LinearHeads, vectors: np.ndarray, labels: list[str]) -> float:
    """Of the full head."""
    return mt.AdaptiveClassifier(heads, [float("inf")] * (len(heads.widths) - 1)).measure(vectors, labels).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["mrl", "mrl-e"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heads", choices=("trained", "fitted"), default="trained")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128, 1024], help="of fitted heads")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(*splits(options))
    labels = list(task.test_labels)
    for model in options.models:
        for seed in range(options.seeds):
            name = f"{model}-{seed}"
            vectors = np.load(options.scratch / f"{name}-val.npy").astype(np.float32)
            trained = LinearHeads.of(*load_head(options.scratch / name))
            heads = trained if options.heads == "trained" else fitted(name, list(task.train_labels), options)
            parts, whole = halves(vectors, labels), accuracy(trained, vectors, labels)
            for lost in LOST:
                row = {"model": model, "seed": seed, "heads": options.heads, "lost": lost}
                row |= {"strength": "of each width"} if options.heads == "fitted" else {}
                row |= measured(heads, parts, lost) | {"trained_full": whole}
                print(json.dumps(row), flush=True)
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
