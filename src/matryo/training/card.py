"""What a finished model says about itself: int8 scales, scores per width and code, README.md with table and figure."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import matryo
from matryo.core.codecs import Int8, codec
from matryo.core.metrics import measure
from matryo.core.prefix import Nesting, truncate
from matryo.core.ranking import ranks_in_task
from matryo.core.records import Retrieval
from matryo.encoders.model import Card
from matryo.training.config import TrainConfig
from matryo.training.dev import DevEvaluator, Encode

FIGURE = "quality_by_width.svg"
SCORED_CODES = ("float32", "int8", "binary")


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    names = ("torch", "sentence-transformers", "transformers", "tokenizers", "numpy")
    return {"matryo": matryo.__version__, "python": platform.python_version()} | {n: version(n) for n in names}


def int8_scales(vectors: NDArray[np.float32], nesting: Nesting) -> dict[int, NDArray[np.float32]]:
    """The int8 scale of every trained width, fitted on prefixes: after the cut, never before."""
    return {width: Int8(width).fit(truncate(vectors, width)).state["scale"] for width in nesting.widths}


def score_rows(
    dev: DevEvaluator, encode: Encode, nesting: Nesting, codes: Sequence[str] = SCORED_CODES
) -> list[dict[str, Any]]:
    """Dev scores of every trained width, and of every code for a retrieval set."""
    task = dev.task
    if not isinstance(task, Retrieval):
        scores = dev.scores(encode)
        return [_row(task.name, dev.metric_name, width, "float32", scores[width]) for width in nesting.widths]
    queries, documents = encode(task.queries), encode(task.texts)
    found = []
    for code in codes:
        for width in nesting.widths:
            if code == "binary" and width % 8:
                continue
            store = codec(code, width).fit(truncate(documents, width))
            coded = store.decode(store.encode(truncate(documents, width)))
            asked = truncate(queries, width)
            # Hamming order, what a scan of binary codes gives: both sides are signs.
            asked = store.decode(store.encode(asked)) if code == "binary" else asked
            ranks = ranks_in_task(task, asked, coded, [width])[width]
            found.append(_row(task.name, dev.metric_name, width, code, measure(dev.metric, ranks, task.judged).mean()))
    return found


def _row(task: str, metric: str, width: int, code: str, value: float) -> dict[str, Any]:
    size = codec(code, width).bytes_per_item
    return {
        "task": task,
        "metric": metric,
        "width": width,
        "code": code,
        "bytes": size,
        "value": round(float(value), 5),
    }


def write_readme(folder: Path, card: Card, config: TrainConfig) -> None:
    """README.md and its figure, for people; everything in it comes from `matryo.json`'s content."""
    nesting = card.nesting
    assert nesting is not None
    lines = [
        "---",
        "library_name: sentence-transformers",
        "tags: [sentence-transformers, sentence-similarity, feature-extraction, matryoshka, matryo]",
        "---",
        "",
        f"# {folder.resolve().name}",
        "",
        f"A nested (Matryoshka) text embedding model of {nesting.D} dimensions. Every one of its first "
        f"{', '.join(map(str, nesting.widths))} dimensions, renormalised, is an embedding of its own.",
        "",
    ]
    if card.scores:
        lines += [*_table(card), "", f"![Quality against width]({FIGURE})", ""]
        _figure(folder / FIGURE, card)
    lines += [
        "## Use",
        "",
        "```python",
        "import matryo as mt",
        "",
        f'model = mt.load("{folder.resolve().name}")',
        f'vectors = model.encode(["a text"], width={nesting.widths[len(nesting) // 2]})',
        "```",
        "",
        "Plain sentence-transformers loads the same folder; normalise after truncating "
        "(`encode(..., truncate_dim=d, normalize_embeddings=True)`).",
        "",
        "## Training",
        "",
        "```json",
        json.dumps(card.training, indent=2, ensure_ascii=False),
        "```",
        "",
        f"Started from {config.base or 'scratch (a static encoder: token vectors and their mean)'}; trained with "
        f"nested {', '.join(dict.fromkeys(one.loss for one in config.sets()))} (Matryoshka Representation Learning, "
        "arXiv 2205.13147).",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _table(card: Card) -> list[str]:
    codes = list(dict.fromkeys(row["code"] for row in card.scores))
    by_place = {(row["width"], row["code"]): row["value"] for row in card.scores}
    first = card.scores[0]
    full = max(row["width"] for row in card.scores)
    lines = [
        f"{first['metric']} on {first['task']} by width and code. The checkpoint was chosen on the same dev set.",
        "",
        "| width | " + " | ".join(codes) + " | share of full quality |",
        "|---|" + "---|" * (len(codes) + 1),
    ]
    for width in sorted({row["width"] for row in card.scores}):
        cells = [f"{by_place[width, c]:.4f}" if (width, c) in by_place else "" for c in codes]
        share = by_place[width, codes[0]] / by_place[full, codes[0]] if by_place[full, codes[0]] else float("nan")
        lines.append(f"| {width} | " + " | ".join(cells) + f" | {share:.1%} |")
    return lines


def _figure(path: Path, card: Card) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "matryo", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for code in dict.fromkeys(row["code"] for row in card.scores):
            points = [(row["width"], row["value"]) for row in card.scores if row["code"] == code]
            axes.plot(*zip(*points, strict=True), marker="o", label=code)
            axes.annotate(code, points[-1], xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks([width for width, _ in card.nesting or []], [str(width) for width, _ in card.nesting or []])
        axes.set_xlabel("width")
        axes.set_ylabel(card.scores[0]["metric"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None})
