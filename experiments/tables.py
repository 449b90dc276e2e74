"""The tables of docs/results.md, from the rows that the experiments wrote.

python experiments/tables.py [images|probes|cascade|funnel|depth ...]
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
METRICS = ("head top-1", "1-NN", "mAP@10")


def rows(path: str) -> list[dict[str, Any]]:
    """The rows of a file of results, none where it is not there yet."""
    place = HERE / path
    return [json.loads(line) for line in place.read_text().splitlines()] if place.is_file() else []


def spread(values: Iterable[float], scale: float = 100, digits: int = 1) -> str:
    """Mean and, where there are several, standard deviation over seeds."""
    found = [scale * value for value in values]
    if not found:
        return ""
    mean = f"{np.mean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ± {np.std(found, ddof=1):.{digits}f}"


def table(head: list[str], body: Iterable[list[str]]) -> None:
    """Markdown."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for line in body:
        print("| " + " | ".join(line) + " |")
    print()


def images() -> None:
    """MRL, MRL-E and fixed-feature models; then the ways to cut one full model."""
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in rows("images/results/tiny.jsonl"):
        kind = "a model for this width" if row["model"].startswith("ff-") else row["model"].upper()
        for metric in METRICS:
            for width, value in row[metric].items():
                found[metric, kind, int(width)].append(value)
    for row in rows("images/results/baselines.jsonl"):
        for metric, kept in (("top-1", "probe"), ("1-NN", "1-NN"), ("mAP@10", "mAP@10")):
            if metric in row:
                found[kept, f"full model, {row['way']}", row["width"]].append(row[metric])
    for metric in (*METRICS, "probe"):
        kinds = list(dict.fromkeys(kind for m, kind, _ in found if m == metric))
        if kinds:
            seeds = {kind: len(next(v for (m, k, _), v in found.items() if (m, k) == (metric, kind))) for kind in kinds}
            print(f"{metric}, % (seeds: {', '.join(f'{k} {n}' for k, n in seeds.items())})\n")
            body = ([kind, *(spread(found.get((metric, kind, w), ())) for w in WIDTHS)] for kind in kinds)
            table(["", *map(str, WIDTHS)], body)


def probes() -> None:
    """Linear heads fitted to the end: MRL's prefixes, and ways to cut the full model."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows("images/results/probes.jsonl"):
        found[row["model"].upper(), row["way"]][row["width"]].append(row["top-1"])
    widths = sorted({width for each in found.values() for width in each})
    body = ([f"{model}, {way}", *(spread(each[w]) for w in widths)] for (model, way), each in found.items())
    table(["top-1", *map(str, widths)], body)


def cascade() -> None:
    """Accuracy against expected width."""
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows("images/results/cascade.jsonl"):
        found[row["model"], row.get("heads", "trained"), row["lost"]].append(row)
    body = (
        [
            f"{model.upper()}, {heads} heads", f"{100 * lost:g}", spread(r["accuracy"] - r["full"] for r in each),
            spread(r["accuracy"] - r.get("trained_full", r["full"]) for r in each),
            spread((r["expected_width"] for r in each), 1, 0), spread((r["last_width"] for r in each), 1, 0),
        ]
        for (model, heads, lost), each in found.items()
    )  # fmt: skip
    less = ["accuracy less the full head's (points)", "less the trained full head's"]
    table(["", "allowed to lose (points)", *less, "expected width", "last width"], body)


def funnel() -> None:
    """A shortlist of short prefixes, reranked, against one scan."""
    body = []
    for row in rows("images/results/funnel.jsonl"):
        quality = [f"{100 * row[name]:.2f}" for name in ("mAP@10", "mAP@10 of one scan")]
        times = [f"{row[name]:.2f}" for name in ("ms", "ms of faiss flat", "ms of our exact plan")]
        name = f"{row['model'].upper()}, seed {row['seed']}"
        body.append([name, *quality, *times, f"{row['times as fast as faiss flat']:.1f}"])
    head = ["", "mAP@10, funnel", "one scan", "ms, funnel", "faiss flat", "our exact plan", "times as fast as faiss"]
    table(head, body)


def depth() -> None:
    """MiniLM by depth and width."""
    found = [row for row in rows("depth/results/minilm.jsonl") if "model" in row]
    widths = sorted({row["width"] for row in found})
    by = {(row["model"], row["depth"], row["width"]): row for row in found}
    names = list(dict.fromkeys((row["model"], row["depth"]) for row in found))
    body = ([f"{name}, {deep} layers", *(f"{by[name, deep, w]['mean']:.4f}" for w in widths)] for name, deep in names)
    table(["mean of the sets", *map(str, widths)], body)
    speeds = [row["speed"] for row in rows("depth/results/minilm.jsonl") if "speed" in row]
    for row in found:
        if (row["model"], row["depth"], row["width"]) == ("2d", 3, 192):
            for key, value in row.items():
                if key.startswith("against"):
                    gap = f"{value['difference']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
                    print(f"- {key}: share {value['share']:.1%} (at least {value['share_low']:.1%}), {gap}")
            print(f"- sets: {row['sets']}")
    print(f"- times as fast as all layers: {', '.join(f'{speed:.2f}' for speed in speeds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made = {"images": images, "probes": probes, "cascade": cascade, "funnel": funnel, "depth": depth}
    parser.add_argument("which", nargs="*", choices=[*made, []], default=[])
    for name in parser.parse_args().which or made:
        print(f"## {name}\n")
        made[name]()


if __name__ == "__main__":
    main()
