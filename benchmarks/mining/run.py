"""Do mined hard negatives help? The demo's static model trained from scratch on the Debian pairs, five ways.

    python benchmarks/mining/run.py [--epochs 3] [--seed 0] [--work FOLDER] [--smoke]

    plain        in-batch negatives alone
    random       and two texts drawn from all positives: as many candidates as the mined runs, none of them hard
    mined full   and the two hardest at full width
    mined widths and the hardest at width 16 and the hardest at full width
    sampled      and one of each of these widths drawn from ranks 1 to 1,000

The miner is the plain model. Same recipe, data, batch and seed in every run. Prints nDCG@10 on the Debian dev split by
width, and the differences to plain and to random with their paired bootstrap intervals over queries; rows go to
results/rows.jsonl.
"""

import argparse
import gzip
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import save
from matryo.core.records import read_pairs
from matryo.demo import DATA
from matryo.demo.run import VOCABULARY, WIDTHS
from matryo.encoders.folder import CARD
from matryo.mining import Mining, mine
from matryo.training.trainer import checkpoints

NARROW = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep models and files here; those that are there are used again")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        rows = compare(folder, options)
    if not options.smoke:
        save(options.out / "rows.jsonl", rows)


def compare(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    pairs = folder / "pairs.jsonl"
    with gzip.open(DATA / "train.jsonl.gz", "rt") as stream:
        pairs.write_text("".join(itertools.islice(stream, 1500 if options.smoke else None)))
    models = {"plain": train(pairs, folder / "plain", options)}
    files = {"random": with_random(pairs, folder / "random.jsonl", options.seed)}
    both = (NARROW, WIDTHS[-1])
    mined = {
        "mined full": Mining(negatives=2),
        "mined widths": Mining(widths=both),
        "sampled": Mining(widths=both, ranks=(1, 1000), sample=True, seed=options.seed),
    }
    for arm, how in mined.items():
        files[arm] = folder / f"{arm}.parquet"
        if files[arm].exists():
            continue
        start = time.perf_counter()
        found = mine(models["plain"], pairs, files[arm], how)
        seconds = time.perf_counter() - start
        dropped = [round(at.false_negatives / found.anchors, 1) for at in found.widths]
        print(f"{arm}: {found.rows} of {found.pairs} pairs in {seconds:.0f} s; false negatives an anchor: {dropped}")
    for arm, path in files.items():
        models[arm] = train(path, folder / arm, options)
    others = {arm: model for arm, model in models.items() if arm != "plain"}
    report = mt.evaluate(
        models["plain"], DATA / "retrieval", WIDTHS, split="dev", baselines=(), twins=others, name="plain"
    )
    return table(report, options)


def train(pairs: Path, out: Path, options: argparse.Namespace) -> Any:
    if (out / CARD).is_file():
        return mt.load(out)
    start = time.perf_counter()
    static: dict[str, Any] = {"width": WIDTHS[-1], "vocabulary": VOCABULARY}
    if (
        out.name != "plain"
    ):  # pairs left out by mining must not change the tokeniser, and with it the table at the start
        static["tokenizer"] = out.with_name("plain") / "tokenizer.json"
    config = mt.TrainConfig(
        pairs=pairs,
        out=out,
        widths=WIDTHS,
        static=static,
        epochs=1 if options.smoke else options.epochs,
        seed=options.seed,
    )
    model = mt.train(config, resume=bool(checkpoints(out / "checkpoints")))
    print(f"{out.name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    return model


def with_random(pairs: Path, out: Path, seed: int) -> Path:
    """The pairs with two negatives drawn from all positives but the row's own."""
    read, draw = read_pairs(pairs), random.Random(seed)
    with out.open("w") as stream:
        for anchor, positive in zip(read.anchors, read.positives, strict=True):
            drawn = [text for text in draw.sample(read.positives, 3) if text != positive][:2]
            row = {"anchor": anchor, "positive": positive, "negative": drawn[0], "negative_2": drawn[1]}
            stream.write(json.dumps(row) + "\n")
    return out


def table(report: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    metric = str(report.metric)
    against = {arm: {row.width: row for row in report.select(metric, arm, "float32")} for arm in ("plain", "random")}
    rows = []
    for arm in report.models:
        for row in report.select(metric, arm, "float32"):
            found = {"arm": arm, "width": row.width, "metric": metric, "split": "dev", "value": row.value}
            line = f"{arm:12} {row.width:4}  {row.value:.4f}"
            for other, at in against.items():
                difference, low, high = report.paired(row, at[row.width])
                found[f"minus {other}"] = {"difference": difference, "low": low, "high": high}
                line += f"  minus {other} {difference:+.4f} [{low:+.4f}, {high:+.4f}]"
            print(line)
            rows.append({**found, "epochs": options.epochs, "seed": options.seed})
    return rows


if __name__ == "__main__":
    main()
