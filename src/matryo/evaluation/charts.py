"""The charts of a report."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from matryo.core.files import write_atomically
from matryo.evaluation.rows import Row
from matryo.pages.charts import INK, SERIES, STYLE, Chart, bytes_axis, canvas, colours, drawn, heading, short

if TYPE_CHECKING:
    from matryo.evaluation.report import Report


def quality_figure(report: "Report") -> Figure:
    """Quality against width for every system in float32, with bands; hollow marks where a width was not trained."""
    figure, axes = canvas(4.4)
    # Depths have a chart of their own.
    rows = [row for row in report.select(code="float32") if row.depth is None]
    names = list(dict.fromkeys(row.model for row in rows))
    hues = colours(names)
    ends: list[tuple[float, float, str, str]] = []
    for name in reversed(names):
        mine = sorted((row for row in rows if row.model == name), key=lambda row: row.width)
        first = name == report.model
        _line(axes, [row.width for row in mine], mine, hues[name], strong=first)
        ends.append((mine[-1].width, mine[-1].value, name, hues[name]))
    _widths_axis(axes, sorted({row.width for row in rows}))
    axes.set_xlabel("width (dimensions kept, log scale)")
    heading(axes, report.metric)
    _labels(axes, ends[::-1])
    return figure


def bytes_figure(report: "Report") -> Figure:
    """Quality against bytes per stored vector: one line per code, one mark per width of the model."""
    figure, axes = canvas(4.4, right=0.97)
    rows = report.select(model=report.model)
    codes = list(dict.fromkeys(row.code for row in rows))
    hues = colours(codes)
    placed: list[tuple[int, int]] = []
    for code in reversed(codes):
        mine = sorted((row for row in rows if row.code == code), key=lambda row: row.bytes)
        _line(axes, [row.bytes for row in mine], mine, hues[code], strong=True)
        # Lines of codes end close together and begin far apart: each is named below its first mark, one level lower
        # where a neighbour's name stands in the way.
        start = mine[0].bytes
        taken = {level for other, level in placed if max(other, start) / min(other, start) < 2.1}
        level = next(n for n in range(len(codes)) if n not in taken)
        placed.append((start, level))
        axes.annotate(
            code, (start, mine[0].value), xytext=(0, -11 - 13 * level), textcoords="offset points",
            ha="center", va="top", fontsize=10.5, fontweight="bold", color=hues[code], zorder=6,
        )  # fmt: skip
    for row in _frontier(rows):
        axes.annotate(
            str(row.width), (row.bytes, row.value), xytext=(0, 7), textcoords="offset points",
            ha="center", va="bottom", fontsize=8.5, color=hues[row.code],
        )  # fmt: skip
    bytes_axis(axes, [row.bytes for row in rows])
    axes.set_xlabel("bytes per stored vector (log scale)")
    heading(axes, report.metric)
    axes.margins(x=0.07, y=0.12 + 0.05 * max(level for _, level in placed))
    return figure


def share_figure(report: "Report") -> Figure:
    """What share of its full quality each width of the model keeps, as bars with intervals."""
    rows = sorted(report.select(model=report.model, code="float32"), key=lambda row: row.width)
    figure, axes = canvas(0.5 + 0.36 * len(rows), left=0.16, right=0.97)
    figure.subplots_adjust(bottom=0.02, top=0.98)
    axes.grid(visible=False)
    places = np.arange(len(rows))[::-1]
    shares = np.nan_to_num([100 * row.share for row in rows])
    hue = SERIES[0]
    for place, row, share in zip(places, rows, shares, strict=True):
        filled = row.trained is not False
        axes.barh(place, share, height=0.62, color=hue, alpha=1 if filled else 0.18, linewidth=0)
        if not filled:
            axes.barh(place, share, height=0.62, color="none", edgecolor=hue, linewidth=1.2)
        if np.isfinite(row.share_low):
            axes.plot([100 * row.share_low, 100 * row.share_high], [place, place], color=INK, linewidth=1.2)
        reach = 100 * row.share_high if np.isfinite(row.share_high) else share
        axes.annotate(
            f"{share:.1f} %", (max(share, reach), place), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=10, color=INK, fontweight="bold" if row.width == report.full else "normal",
        )  # fmt: skip
    axes.set_yticks(places, [f"{row.width}" + ("" if row.trained is not False else " untrained") for row in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlim(0, max(112, float(shares.max()) * 1.12))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return figure


def grid_figure(report: "Report") -> Figure:
    """Depth x width as a heat map: the quality of every sub-network, the whole one at the top right."""
    rows = [row for row in report.select(code="float32") if row.depth is not None or row.model == report.model]
    # The whole encoder does not say how many layers it has: it comes first.
    depths = [None, *sorted({row.depth for row in rows if row.depth is not None}, reverse=True)]
    widths = sorted({row.width for row in rows})
    figure, axes = canvas(0.9 + 0.42 * len(depths), left=0.13, right=0.97)
    axes.grid(visible=False)
    values = [row.value for row in rows]
    low, high = min(values), max(values)
    for row in rows:
        place = (widths.index(row.width), len(depths) - 1 - depths.index(row.depth))
        strength = (row.value - low) / (high - low) if high > low else 1.0
        axes.add_patch(Rectangle(place, 0.96, 0.92, color=SERIES[0], alpha=0.04 + 0.46 * strength, linewidth=0))
        axes.annotate(
            f"{row.value:.3f}", (place[0] + 0.48, place[1] + 0.46), ha="center", va="center", fontsize=10, color=INK,
            fontweight="bold" if row.share >= 0.95 else "normal",
        )  # fmt: skip
    axes.set_xlim(0, len(widths))
    axes.set_ylim(0, len(depths))
    axes.set_xticks([n + 0.48 for n in range(len(widths))], [str(width) for width in widths])
    names = ["all layers" if depth is None else f"{depth} layer" + "s" * (depth > 1) for depth in depths]
    axes.set_yticks([len(depths) - 1 - n + 0.46 for n in range(len(depths))], names)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("width (dimensions kept)")
    heading(axes, f"{report.metric}; bold: at least 95 % of the whole model")
    return figure


def save_quality(report: "Report", path: Path) -> None:
    """Quality against width into a `.png` (200 dots an inch) or `.svg` file, on white."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "matryo"}):
        figure = quality_figure(report)
        title = f"{short(report.model)} on {report.task}"
        figure.text(0.07, 1.0, title, va="bottom", fontsize=12, fontweight="bold", parse_math=False)
        kind = path.suffix[1:]
        facts: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
        write_atomically(
            path,
            lambda temporary: figure.savefig(
                temporary, format=kind, dpi=200, facecolor="white", metadata=facts, bbox_inches="tight"
            ),
        )


def page_charts(report: "Report") -> dict[str, Chart]:
    """All charts as inline SVG that takes the page's colours and fonts."""
    how = f"{report.metric} of {report.model} on {report.task}"
    several = len({row.code for row in report.rows}) > 1
    wanted = {"quality": (quality_figure, f"{how} against width", "Quality against width")}
    if several:
        wanted["bytes"] = (bytes_figure, f"{how} against bytes per vector", "Quality against bytes per vector")
    if any(row.depth is not None for row in report.rows):
        wanted["grid"] = (grid_figure, f"{how} at every depth and width", "Depth and width")
    wanted["share"] = (share_figure, f"Share of full quality kept by each width, {how}", "Share of full quality")
    return {key: drawn(partial(draw, report), key, title, caption) for key, (draw, caption, title) in wanted.items()}


def _line(axes: Axes, places: list[int], rows: list[Row], hue: str, strong: bool) -> None:
    """A line through rows with its band; hollow marks where the width was not trained."""
    values = [row.value for row in rows]
    if len(rows) > 1:
        axes.fill_between(
            places, [row.low for row in rows], [row.high for row in rows],
            color=hue, alpha=0.16 if strong else 0.09, linewidth=0,
        )  # fmt: skip
    axes.plot(places, values, color=hue, linewidth=2.4 if strong else 1.6, zorder=4 if strong else 3)
    for place, row in zip(places, rows, strict=True):
        hollow = row.trained is False
        axes.plot(
            place, row.value, color=hue, marker="o", markersize=6.5 if strong else 4.5, zorder=5, markeredgewidth=1.6,
            markeredgecolor=hue, markerfacecolor="#ffffff" if hollow else hue,
        )  # fmt: skip


def _widths_axis(axes: Axes, widths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    shown: list[int] = []
    for width in widths[::-1]:
        # A tick needs room: a width close to the next one shown keeps its mark but not its number.
        if not shown or shown[-1] / width >= 1.25:
            shown.append(width)
    axes.set_xticks(shown, [str(width) for width in shown])
    axes.minorticks_off()


def _frontier(rows: list[Row]) -> list[Row]:
    """Rows that no row of as few bytes beats."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.bytes, -row.value)):
        if not best or row.value > best[-1].value:
            best.append(row)
    return best


def _labels(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the ends of lines, moved apart where they would overlap and tied to their line by a thin rule.

    They stand in one column right of the plot.
    """
    bottom, top = axes.get_ylim()
    gap = (top - bottom) * 0.062
    right = max(place for place, _, _, _ in ends)
    heights: list[float] = []
    ordered = sorted(ends, key=lambda end: end[1], reverse=True)
    for _, value, _, _ in ordered:
        heights.append(min(value, heights[-1] - gap) if heights else value)
    # Moving labels down only would drag them off the lines: take half of the overhang back.
    shift = (heights[-1] - ordered[-1][1]) / 2 if heights else 0.0
    for (place, value, name, hue), height in zip(ordered, heights, strict=True):
        axes.annotate(
            short(name), (place, value), xytext=(right * 1.22, height - shift), textcoords="data",
            va="center", color=hue, fontsize=10.5, fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": hue, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5, "alpha": 0.55},
        )  # fmt: skip
