"""The demo model against models trained at each width alone, same recipe, data and seed.

    python benchmarks/separate/run.py [--demo runs/demo] [--smoke]

Needs the models of `make demo`; trains the others from the recipe that the nested one records, into
`<demo>/nested-alone`, and uses them again next time. Prints, for each width, nDCG@10 of both on the Debian test split,
and the difference with its paired bootstrap interval over queries; the rows go to results/rows.jsonl. The same
comparison beside every baseline: `matryo eval runs/demo/nested src/matryo/demo/data/retrieval --separate train`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import save
from matryo.demo import DATA
from matryo.evaluation import train_alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--smoke", action="store_true", help="one width")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    nested = mt.load(options.demo / "nested")
    assert nested.nesting is not None
    widths = nested.nesting.widths[:1] if options.smoke else nested.nesting.widths
    alone = train_alone(nested, widths)
    report = mt.evaluate(nested, DATA / "retrieval", nested.nesting.widths, baselines=(), separate=alone, name="nested")
    metric = str(report.metric)
    mine = {row.width: row for row in report.select(metric, "nested", "float32")}
    rows = []
    for row in report.select(metric, "trained at one width", "float32"):
        difference, low, high = report.paired(mine[row.width], row)
        print(f"{row.width:4}  nested {mine[row.width].value:.4f}  alone {row.value:.4f}  "
              f"difference {difference:+.4f} [{low:+.4f}, {high:+.4f}]")  # fmt: skip
        rows.append({"width": row.width, "nested": mine[row.width].value, "alone": row.value, "metric": metric,
                     "difference": difference, "low": low, "high": high, "seed": 0})  # fmt: skip
    if not options.smoke:
        save(options.out / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
