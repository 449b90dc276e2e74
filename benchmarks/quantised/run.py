"""Quantisation-aware training against quantising afterwards, on the bundled Debian descriptions.

    python benchmarks/quantised/run.py [--smoke] [--seeds 0 1 2] [--split test]

For each seed two static models are trained with the settings of the demo (same starting table, order of pairs, rate,
epochs; the last weights of both): one with nested InfoNCE on the vectors, one with the same plus nested InfoNCE on
their signs, straight-through. Prints nDCG@10 of both in every code at every width, and the difference, query by query,
with its bootstrap interval. The settings of the second were chosen on the dev split with seed 0 (`--split dev`, which
writes no rows). Rows go to results/rows.jsonl.
"""

import argparse
import gzip
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import save
from matryo.core.records import Retrieval, read_retrieval
from matryo.demo import DATA
from matryo.demo.run import VOCABULARY, WIDTHS
from matryo.encoders.static import StaticEncoder
from matryo.evaluation.bootstrap import Resampling, mean_draws

METRIC, CODES = "nDCG@10", ("float32", "int8", "binary")
TEMPERATURE = 0.065
"""What `matryo train` takes for a static model by default."""
SIGN_WEIGHTS = (0.0, 0.0, 1.0, 1.0, 1.0, 1.0)
"""16 and 32 bits are too few to search by, and what fits them does not fit the bits that follow."""
SIGN_TEMPERATURES = (0.15, 0.12, 0.09, 0.065, 0.05, 0.045)
"""Cosines of unrelated signs scatter by 1 / sqrt(bits): a short prefix needs a higher one."""
Scores = dict[tuple[str, int], np.ndarray]


def trained(aware: bool, pairs: Path, options: Any, seed: int) -> StaticEncoder:
    arguments: dict[str, Any] = {"temperature": TEMPERATURE}
    if aware:
        arguments = {
            "codes": {"float32": 1.0, "binary": options.weights},
            "temperature": {"float32": TEMPERATURE, "binary": options.temperatures},
            "clip": options.clip,
        }
    with tempfile.TemporaryDirectory() as folder:
        config = mt.TrainConfig(
            pairs=pairs,
            out=Path(folder) / "model",
            static={"width": WIDTHS[-1], "vocabulary": VOCABULARY},
            widths=WIDTHS,
            loss="quantised_info_nce" if aware else "info_nce",
            loss_args=arguments,
            epochs=options.epochs,
            seed=seed,
            best="last",
            device="cpu",
        )
        encoder = mt.train(config).encoder
    assert isinstance(encoder, StaticEncoder)
    return encoder


def measured(encoder: StaticEncoder, task: Retrieval) -> Scores:
    """nDCG@10 of every query, by (code, width)."""
    vectors = encoder.vectors(task.queries, 64, False), encoder.vectors(task.documents, 64, False)
    report = mt.evaluate(vectors, task, WIDTHS, codes=CODES, baselines=(), metric=METRIC, further=(), resamples=2)
    return {(row.code, row.width): report.per_query[row.label][METRIC] for row in report.select(METRIC)}


def compared(aware: Scores, afterwards: Scores, **more: Any) -> list[dict[str, Any]]:
    rows = []
    for (code, width), mine in aware.items():
        theirs = afterwards[code, width]
        resampling = Resampling(len(mine))
        low, high = resampling.interval(mean_draws([mine - theirs], resampling)[0])
        scores = {"aware": float(mine.mean()), "afterwards": float(theirs.mean())}
        paired = {"difference": float((mine - theirs).mean()), "low": low, "high": high}
        rows.append({"code": code, "width": width, "metric": METRIC, **scores, **paired, **more})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--weights", type=float, nargs=len(WIDTHS), default=SIGN_WEIGHTS, help="of the terms for signs")
    parser.add_argument("--temperatures", type=float, nargs=len(WIDTHS), default=SIGN_TEMPERATURES, help="of the same")
    parser.add_argument("--clip", type=float, default=1.0, help="where their gradient stops")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    pairs = DATA / "train.jsonl.gz"
    if options.smoke:
        options.epochs, options.seeds = 1, [0]
        pairs = Path(tempfile.mkdtemp()) / "pairs.jsonl"
        with gzip.open(DATA / "train.jsonl.gz", "rt") as stream:
            pairs.write_text("".join(itertools.islice(stream, 600)))
    task = read_retrieval(DATA / "retrieval", options.split)
    setting = {name: getattr(options, name) for name in ("split", "weights", "temperatures", "clip", "epochs")}
    rows, kept = [], []
    for seed in options.seeds:
        scores, seconds = {}, {}
        for name in ("aware", "afterwards"):
            start = time.perf_counter()
            encoder = trained(name == "aware", pairs, options, seed)
            seconds[f"{name}_seconds"] = time.perf_counter() - start
            scores[name] = measured(encoder, task)
        kept.append(scores)
        rows += compared(scores["aware"], scores["afterwards"], seed=seed, **seconds, **setting)
    # Seeds differ as queries do: the mean over seeds, query by query, is what a new run may be expected to give.
    mean: dict[str, Scores] = {
        name: {cell: np.mean([scores[name][cell] for scores in kept], axis=0) for cell in kept[0][name]}
        for name in kept[0]
    }
    rows += compared(mean["aware"], mean["afterwards"], seed="mean", **setting)
    for row in rows:
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        print(f"seed {row['seed']:>4}  {row['width']:4}:{row['code']:8} aware {row['aware']:.4f}  "
              f"afterwards {row['afterwards']:.4f}  difference {row['difference']:+.4f} {interval}")  # fmt: skip
    if not options.smoke and options.split == "test":
        save(options.out / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
