"""The paper's cheap ways to short vectors, on the vectors that tiny.py kept: prefix, random features, SVD, PCA.

    python experiments/images/baselines.py DATA --scratch SCRATCH [--model ff-1024] [--seeds 3] [--probe]

All are made from one model of full width; SVD and PCA are fitted on the training pictures only. Per width: 1-NN and
mAP@10 among the training pictures, as `mt.evaluate` has them; with --probe top-1 of a linear probe on the short
training vectors too, which takes most of an hour a seed.
One row per finished way and width to results/baselines.jsonl; a seed that has rows is not measured again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tiny import WIDTHS, splits, task_of

from matryo.evaluation.labelled import evaluate_labelled

RESULTS = Path(__file__).parent / "results" / "baselines.jsonl"
METRICS = ("top-1", "1-NN", "mAP@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", default="ff-1024")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.results.open()] if options.results.is_file() else []
    done = {(row["model"], row["seed"]) for row in rows}
    train, val = splits(options)
    for seed in range(options.seeds):
        if (options.model, seed) in done:
            continue
        kept = [np.load(options.scratch / f"{options.model}-{seed}-{split}.npy") for split in ("train", "val")]
        vectors = (kept[0].astype(np.float32), kept[1].astype(np.float32))
        report = evaluate_labelled(
            vectors, task_of(train, val), options.widths, baselines=["select", "svd", "pca"], name="prefix", seed=seed,
            probe=options.probe,
        )  # fmt: skip
        found: dict[tuple[str, int], dict[str, float]] = {}
        for row in report.rows:
            if row.metric in METRICS:
                found.setdefault((row.model, row.width), {})[row.metric] = row.value
        with options.results.open("a") as file:
            for (way, width), values in found.items():
                line = {"model": options.model, "seed": seed, "way": way, "width": width, **values}
                file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
