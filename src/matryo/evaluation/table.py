"""The report in a terminal."""

import io
import math
from typing import TYPE_CHECKING

from matryo.evaluation.rows import Row

if TYPE_CHECKING:
    from matryo.evaluation.report import Report


def headers(report: "Report", metric: str) -> list[str]:
    """Column titles of the table of one metric."""
    how = report.facts()["confidence"]
    return ["model", "width", "code", "bytes", metric, f"{how:.0%} interval", "of full", "difference", "held against"]


def cells(row: Row) -> list[str]:
    """One row as text, in the order of `headers`."""
    width = f"{row.width} untrained" if row.trained is False else str(row.width)
    share = "–" if math.isnan(row.share) else f"{row.share:.1%}"
    if row.difference is None or row.difference_low is None or row.difference_high is None:
        gap = "–"
    else:
        gap = f"{signed(row.difference)} [{signed(row.difference_low)}, {signed(row.difference_high)}]"
    interval = f"[{row.low:.4f}, {row.high:.4f}]"
    return [
        row.model,
        width,
        row.code,
        f"{row.bytes:,}",
        f"{row.value:.4f}",
        interval,
        share,
        gap,
        (row.versus or "–").removesuffix(":float32"),
    ]


def signed(value: float) -> str:
    """A difference with its sign (a true minus), four places."""
    rounded = round(value, 4)
    return f"{rounded:+.4f}".replace("-", "−") if rounded else "0.0000"


def as_text(report: "Report", metric: str | None = None) -> str:
    """The rows of one metric as an aligned table, with the facts above and the notes below."""
    wanted = metric or report.metric
    rows = report.select(wanted)
    counts = ", ".join(f"{n:,} {what}" for what, n in report.counts.items())
    facts = report.facts()
    above = f"{report.model} on {report.task} ({counts})"
    below = [
        f"Intervals: {facts['interval']}, {facts['resamples']:,} resamples, seed {facts['seed']}, paired across rows.",
        *report.notes,
    ]
    body = _drawn(headers(report, wanted), [cells(row) for row in rows], [row.model for row in rows])
    return "\n".join([above, "", body, "", *below])


def _drawn(titles: list[str], lines: list[list[str]], groups: list[str]) -> str:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return _plain(titles, lines)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if 1 <= number <= 7 and number != 2 else "left", no_wrap=True)
    for number, line in enumerate(lines):
        last = number + 1 < len(lines) and groups[number + 1] != groups[number]
        table.add_row(*line, end_section=last)
    stream = io.StringIO()
    wide = sum(max(map(len, column)) + 2 for column in zip(titles, *lines, strict=True))
    Console(file=stream, width=wide + 2 * len(titles), color_system=None, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def _plain(titles: list[str], lines: list[list[str]]) -> str:
    """The same without rich: columns padded with blanks."""
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    padded = [
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in (titles, *lines)
    ]
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:]])
