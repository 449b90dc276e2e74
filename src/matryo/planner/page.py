"""Plans as one HTML page."""

import re

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from matryo.pages import rendered
from matryo.pages.charts import FAINT, bytes_axis, canvas, colours, drawn, heading
from matryo.planner.plans import Plans, Row, cells_of
from matryo.planner.quantities import size


def as_html(plans: Plans) -> str:
    """The whole page as text."""
    facts = plans.facts
    caption = f"Milliseconds of one search against bytes in memory per item, at {facts['items']:,} items"
    chart = drawn(lambda: frontier_figure(plans), "frontier", "Frontier", caption) if plans.frontier else None
    return rendered(
        "matryo.planner",
        "plans.html",
        plans=plans,
        facts=facts,
        summary=_summary(plans),
        # Our own markup; matplotlib and `inline` have escaped the names inside it.
        chart=None if chart is None else (Markup(chart.svg), chart.caption),
        lines=[(cells_of(row), row is plans.choice) for row in plans.frontier],
        sizes=[(str(row.plan), row.measured, row.error) for row in plans.frontier],
        yaml=plans.to_yaml() if plans.choice else "",
    )


def frontier_figure(plans: Plans) -> Figure:
    """Predicted milliseconds against bytes per item; a hue per code, the recommendation large."""
    figure, axes = canvas(4.4, right=0.97)
    rows = plans.frontier
    hues = colours(list(dict.fromkeys(_code(row) for row in rows)))
    spots = [max(1.0, row.bytes_per_item) for row in rows]
    axes.plot(spots, [row.predicted.ms for row in rows], color=FAINT, linewidth=1, zorder=2)
    for spot, row in zip(spots, rows, strict=True):
        hue, chosen = hues[_code(row)], row is plans.choice
        scale = row.predicted.ms / row.last.ms
        axes.vlines(spot, row.last.ms_low * scale, row.last.ms_high * scale, color=hue, linewidth=1.4, alpha=0.6)
        axes.plot(spot, row.predicted.ms, marker="o", markersize=11 if chosen else 6.5, color=hue, zorder=4)
        side = -1 if spot * spot > min(spots) * max(spots) and len(rows) > 1 else 1  # towards the middle, where room is
        axes.annotate(
            f"{row.plan.stages[0].width}:{_code(row)}", (spot, row.predicted.ms), xytext=(10 * side, -3),
            ha="right" if side < 0 else "left", textcoords="offset points", fontsize=9, color=hue,
            fontweight="bold" if chosen else "normal",
        )  # fmt: skip
    bytes_axis(axes, [max(1, round(spot)) for spot in spots])
    axes.set_yscale("log")
    # Plain numbers: the powers of ten that a log scale writes are formulas, which no chart of a page parses.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes in memory per item (log scale)")
    heading(axes, "milliseconds of one search (log scale), 10-90 % of queries")
    axes.margins(x=0.09, y=0.2)
    return figure


def _code(row: Row) -> str:
    first = row.plan.stages[0]
    return re.sub(r"[0-9]+$", "", first.code) if first.code.startswith("pq") else first.code


def _summary(plans: Plans) -> list[tuple[str, str, str]]:
    """The figures at the head of the page: (number, what it is, detail)."""
    row = plans.choice
    found = []
    if row is not None:
        last, then = row.last, row.predicted
        each = f"{row.bytes_per_item:.0f} bytes per item, {size(then.disk_bytes)} on disk"
        found = [
            (f"{then.ms:.2f} ms", f"expected at {then.items:,} items", f"{last.ms:.2f} ms measured at {last.items:,}"),
            (size(then.code_bytes), "in memory", each),
            (f"{row.recall:.4f}", f"recall@{plans.facts['k']} on the sample", f"at least {row.bound:.4f}"),
        ]
    if plans.width_alone:
        found.append((str(plans.width_alone), f"of {plans.facts['width']} dimensions are enough alone",
                      f"{plans.width_reranked or 'none'} with a rerank"))  # fmt: skip
    return found
