"""The cascade on CLINC150: heads from train, thresholds from val, figures from test.

    python experiments/cascade/clinc.py DATA --model MODEL --name all-MiniLM-L6-v2

DATA holds clinc150_{train,val,test}.jsonl.gz (text, label). One row for the full head, and one per target, given as
what may be lost of the full head's accuracy on val.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import matryo as mt
from matryo.classify import fit_heads
from matryo.core.records import read_labelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="of the model in the rows; its folder's if unset")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "clinc150.jsonl")
    given = parser.parse_args()
    model = mt.load(given.model)
    splits = {name: read_labelled(given.data / f"clinc150_{name}.jsonl.gz") for name in ("train", "val", "test")}
    vectors = {name: model.encode(rows.texts) for name, rows in splits.items()}
    widths = [w for w in (8, 16, 32, 64, 128, 256) if w < model.width] + [model.width]
    started = time.perf_counter()
    heads = fit_heads(vectors["train"], splits["train"].labels, widths)
    seconds = time.perf_counter() - started
    train, val, test = ((vectors[name], splits[name].labels) for name in ("train", "val", "test"))
    full = mt.AdaptiveClassifier(heads, [float("inf")] * (len(widths) - 1))
    base = {"model": given.name or Path(given.model).name, "widths": widths, "fit_seconds": round(seconds, 1)}
    rows = [{**base, "lost": None, **asdict(full.measure(*test))}]
    for lost in (0.0, 0.002, 0.01, 0.03):
        target = full.measure(*val).accuracy - lost
        made = mt.AdaptiveClassifier.fit(*train, val, heads=heads, target=target)
        rows.append({**base, "lost": lost, **asdict(made.measure(*test))})
    for row in rows:
        row["thresholds"] = [None if t == float("inf") else round(t, 4) for t in row["thresholds"]]
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
