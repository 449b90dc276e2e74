"""Where the time of a step of image training goes: the backbone's share, and pictures a second.

    python benchmarks/images/throughput.py [--threads 1] [--steps 60]

The recipe of experiments/images/tiny.py on random pictures: augmentation, network forward, nested loss with its own
gradient, network backward, optimiser, one after the other and timed apart. Medians over the steps.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from matryo.encoders.images import Pictures
from matryo.encoders.images.augment import crop_and_flip
from matryo.encoders.images.network import NetworkConfig
from matryo.losses import nested_cross_entropy
from matryo.training.images import ImageConfig, Run

PARTS = ("augment", "forward", "loss", "backward", "optimiser")
BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128],
    "depths": [1, 1, 1],
    "layer_type": "basic",
}


def timed(run: Run, rng: np.random.Generator, rows: np.ndarray) -> list[float]:
    """Seconds of each part of one step."""
    marks = [time.perf_counter()]
    pixels = torch.from_numpy(crop_and_flip(run.pictures.pixels[rows], rng))
    labels = torch.from_numpy(run.labels_N[rows])
    marks.append(time.perf_counter())
    run.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=run.config.precision == "bfloat16"):
        features = run.network(pixels)
    marks.append(time.perf_counter())
    cut = features.detach().requires_grad_()
    nested_cross_entropy(cut, labels, run.head, nesting=run.nesting, label_smoothing=0.1).backward()
    marks.append(time.perf_counter())
    features.backward(cut.grad)
    marks.append(time.perf_counter())
    run.optimizer.step()
    marks.append(time.perf_counter())
    return list(np.diff(marks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    pictures = Pictures(
        rng.integers(0, 256, (20000, 32, 32, 3), dtype=np.uint8), np.arange(20000) % 100, tuple(map(str, range(100)))
    )
    widths = tuple(8 * 2**n for n in range(8))
    for precision in ("float32", "bfloat16"):
        for tied in (False, True):
            with tempfile.TemporaryDirectory() as place:
                network = NetworkConfig(BACKBONE, width=1024, stem="half")
                run = Run(ImageConfig(Path(place), network, widths=widths, tied=tied, precision=precision), pictures)
            times = np.array([timed(run, rng, rng.integers(0, 20000, 128)) for _ in range(options.steps)])[5:]
            parts = np.median(times, axis=0)
            row = {"precision": precision, "heads": "MRL-E" if tied else "MRL", "threads": options.threads}
            row |= {name: round(1000 * float(part), 2) for name, part in zip(PARTS, parts, strict=True)}
            row["backbone_share"] = round(float((parts[1] + parts[3]) / parts.sum()), 3)
            row["pictures_per_s"] = round(128 / float(parts.sum()))
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
