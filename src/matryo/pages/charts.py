"""What every chart shares, drawn by matplotlib. In a page they take its colours; as files they stand on white."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 8.2
"""Inches."""

LONGEST_LABEL = 24
"""Characters that fit beside a chart."""

INK, FAINT, RULE = "#1b1f24", "#626a73", "#d9dde2"
"""Text, secondary text and grid lines on white."""

SERIES = ("#0b57d0", "#c2410c", "#64748b", "#0f766e", "#7c3aed", "#a16207")
"""One hue per system or code, in order; the model is always the first. Each reads at 4.5:1 or better on white."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # A name that holds dollar signs is a name, not a formula.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page."""

    svg: str
    caption: str


def colours(names: list[str]) -> dict[str, str]:
    """A hue per name, in order; from the seventh on they come round again."""
    return {name: SERIES[n % len(SERIES)] for n, name in enumerate(names)}


def drawn(figure_of: Callable[[], Figure], key: str, title: str, caption: str) -> Chart:
    """A figure as inline SVG that takes the page's colours and fonts; drawn inside the page's style."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"matryo-{key}"}):
        stream = io.StringIO()
        figure_of().savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return Chart(inline(stream.getvalue(), key, title, f"{caption}. The table below holds every number."), caption)


def canvas(height: float, left: float = 0.07, right: float = 0.79) -> tuple[Figure, Axes]:
    """Every chart has the same width in inches, so that its text has the same size on the page."""
    figure = Figure(figsize=(WIDTH, height))
    # Heights of the margins are in inches too: a short chart keeps room for its labels.
    figure.subplots_adjust(left=left, right=right, bottom=0.6 / height, top=1 - 0.4 / height)
    return figure, figure.add_subplot()


def heading(axes: Axes, metric: str) -> None:
    """The name of the vertical axis, upright above it, where it is read first."""
    axes.set_title(metric, loc="left", fontsize=11, color=FAINT, pad=12)


def bytes_axis(axes: Axes, sizes: list[int]) -> None:
    """A log scale of bytes, a tick at each power of two."""
    axes.set_xscale("log", base=2)
    low, high = int(np.floor(np.log2(min(sizes)))), int(np.ceil(np.log2(max(sizes))))
    ticks = [1 << n for n in range(low, high + 1)]
    axes.set_xticks(ticks, [f"{t // 1024} KiB" if t >= 1024 else str(t) for t in ticks])
    axes.minorticks_off()


def inline(svg: str, key: str, title: str, description: str) -> str:
    """Matplotlib's file as an element of the page: colours become variables, ids unique, fonts the page's own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r"font: ((?:bold |italic )*)([\d.]+)px [^;\"]*", r"font: \1\2px var(--sans)", svg)
    variables = {INK: "--ink", FAINT: "--faint", RULE: "--rule", "#ffffff": "--paper"}
    variables |= {hue: f"--series-{n}" for n, hue in enumerate(SERIES)}
    for hue, name in variables.items():
        svg = svg.replace(hue, f"var({name})")
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    label = f'role="img" aria-labelledby="{key}-title {key}-desc"'
    names = f'<title id="{key}-title">{_safe(title)}</title><desc id="{key}-desc">{_safe(description)}</desc>'
    return f"{head} {label}>{names}{rest}"


def short(name: str) -> str:
    """A name that fits beside a chart; the table has it whole."""
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _safe(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
