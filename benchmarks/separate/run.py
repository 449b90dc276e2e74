"""The demo model against models trained at each width alone, same recipe, data and seed.

    python benchmarks/separate/run.py [--demo runs/demo] [--smoke]

Needs the models of `make demo`. Prints, for each width, nDCG@10 of both on the Debian test split, and the difference
with its paired bootstrap interval over queries; the rows go to results/rows.jsonl.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import save
from matryo.demo import DATA
from matryo.demo.run import VOCABULARY, WIDTHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    nested = mt.load(options.demo / "nested")
    widths = WIDTHS[2:3] if options.smoke else WIDTHS
    alone = {}
    with tempfile.TemporaryDirectory() as folder:
        for width in widths:
            config = mt.TrainConfig(
                pairs=DATA / "train.jsonl.gz",
                out=Path(folder) / str(width),
                widths=(width,),
                static={"width": width, "vocabulary": VOCABULARY},
                dev=DATA / "retrieval",
                epochs=1 if options.smoke else 5,
            )
            alone[width] = mt.train(config)
            print(f"trained width {width} alone", flush=True)
        report = mt.evaluate(nested, DATA / "retrieval", WIDTHS, baselines=(), separate=alone, name="nested")
    metric = str(report.metric)
    mine = {row.width: row for row in report.select(metric, "nested", "float32")}
    rows = []
    for name in report.models[1:]:
        for row in report.select(metric, name, "float32"):
            difference, low, high = report.paired(mine[row.width], row)
            print(f"{row.width:4}  nested {mine[row.width].value:.4f}  alone {row.value:.4f}  "
                  f"difference {difference:+.4f} [{low:+.4f}, {high:+.4f}]")  # fmt: skip
            rows.append({"width": row.width, "nested": mine[row.width].value, "alone": row.value, "metric": metric,
                         "difference": difference, "low": low, "high": high, "seed": 0})  # fmt: skip
    if not options.smoke:
        save(options.out / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
