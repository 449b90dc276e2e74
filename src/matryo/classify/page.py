"""A cascade's trade-off as one HTML page."""

from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from matryo.classify.adaptive import AdaptiveClassifier, Tradeoff
from matryo.core.errors import InputError
from matryo.core.files import write_text
from matryo.pages import rendered
from matryo.pages.charts import FAINT, SERIES, bytes_axis, canvas, drawn, heading


def save_page(
    path: str | Path,
    made: AdaptiveClassifier,
    chosen: Tradeoff,
    curve: list[Tradeoff],
    alone: list[Tradeoff],
    rows: int,
) -> Path:
    """Write the page.

    Args:
        path: of an .html file.
        made: the classifier.
        chosen: its thresholds in use, measured.
        curve: every rung it learned, measured on the same rows.
        alone: the head of each width with no cascade, on the same rows.
        rows: how many rows these are.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise InputError(f"the report must end in .html, got {path.name!r}")
    caption = "Accuracy against dimensions read an item: the cascade's rungs, and one head alone at each width"
    chart = drawn(lambda: curve_figure(chosen, curve, alone), "cascade", "The trade-off", caption)
    full = alone[-1]
    text = rendered(
        "matryo.classify",
        "cascade.html",
        rows=rows,
        chosen=chosen,
        full=full,
        share=chosen.expected_width / full.expected_width,
        classes=len(made.heads.classes),
        tied=made.heads.tied,
        chart=(Markup(chart.svg), chart.caption),
        steps=list(zip(made.heads.widths, [_said(t) for t in chosen.thresholds] + ["stops"], strict=True)),
        alone=list(zip(made.heads.widths, alone, strict=True)),
        curve=sorted(curve, key=lambda one: one.expected_width),
    )
    write_text(path, text)
    return path


def curve_figure(chosen: Tradeoff, curve: list[Tradeoff], alone: list[Tradeoff]) -> Figure:
    """Accuracy against expected width on a log scale."""
    figure, axes = canvas(4.4, right=0.97)
    rungs = sorted(curve, key=lambda one: one.expected_width)
    for hue, points, name, mark in ((SERIES[0], rungs, "cascade", "."), (SERIES[2], alone, "one head alone", "s")):
        spots = [one.expected_width for one in points]
        axes.plot(spots, [one.accuracy for one in points], color=hue, marker=mark, label=name)
    axes.plot(chosen.expected_width, chosen.accuracy, color=SERIES[0], marker="o", markersize=11, zorder=4)
    bytes_axis(axes, [max(1, round(one.expected_width)) for one in (*rungs, *alone)])
    axes.set_xlabel("dimensions read an item, every head that was evaluated counted (log scale)")
    heading(axes, "accuracy")
    axes.legend(frameon=False, labelcolor=FAINT, loc="lower right")
    axes.margins(x=0.06, y=0.12)
    return figure


def _said(threshold: float) -> str:
    if threshold == float("inf"):
        return "skipped"
    return "goes on" if threshold > 1 else f"stops from {threshold:.3f}"
