"""Top-1 of linear heads fitted to the end: MRL's prefixes against cheap ways to cut one un-nested model.

    OPENBLAS_NUM_THREADS=1 python experiments/images/probes.py DATA --scratch SCRATCH [--seeds 3]

On the vectors that tiny.py kept: prefixes of mrl; of ff-1024 the prefix, random features and the first singular
directions, fitted on the training pictures. All heads are `matryo.classify.fit_heads` on the training pictures with its
own defaults, measured on val. One row per seed, way and width to results/probes.jsonl; what has a row is not measured
again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tiny import splits, task_of

from matryo.classify import fit_heads
from matryo.evaluation.labelled import baseline
from matryo.evaluation.systems import System

RESULTS = Path(__file__).parent / "results" / "probes.jsonl"
WAYS = (("mrl", "prefix"), ("ff-1024", "svd"), ("ff-1024", "select"), ("ff-1024", "prefix"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(*splits(options))
    known = [json.loads(line) for line in options.results.open()] if options.results.is_file() else []
    done = {(row["model"], row["way"], row["seed"], row["width"]) for row in known}
    for seed in range(options.seeds):
        for model, way in WAYS:
            left = [width for width in options.widths if (model, way, seed, width) not in done]
            if not left:
                continue
            kept = [np.load(options.scratch / f"{model}-{seed}-{split}.npy") for split in ("train", "val")]
            system = System(model, kept[1].astype(np.float32), kept[0].astype(np.float32), tuple(options.widths))
            cut = system if way == "prefix" else baseline(way, system, seed)
            for width in left:
                heads = fit_heads(cut.second, task.train_labels, [width])
                found = np.array(heads.classes)[heads.logits(cut.first, 0).argmax(1)]
                row = {"model": model, "way": way, "seed": seed, "width": width}
                row["top-1"] = float((found == np.array(task.test_labels)).mean())
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
