"""The report as one HTML file: no scripts, nothing fetched, every text escaped."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from matryo.evaluation import table
from matryo.evaluation.charts import page_charts
from matryo.evaluation.rows import Row
from matryo.pages import rendered

if TYPE_CHECKING:
    from matryo.evaluation.report import Report, Section


def as_html(report: "Report", extra: Sequence["Section"] = ()) -> str:
    """The whole page as text."""
    # The charts are our own markup; matplotlib and `inline` have escaped the names inside them.
    charts = {key: (Markup(chart.svg), chart.caption) for key, chart in page_charts(report).items()}
    tables = [
        {
            "metric": metric,
            "headers": table.headers(report, metric)[1:],
            "groups": [(name, _lines(report.select(metric, name))) for name in report.models],
        }
        for metric in report.metrics
    ]
    return rendered(
        "matryo.evaluation",
        "report.html",
        report=report,
        facts=report.facts(),
        summary=_summary(report),
        charts=charts,
        tables=tables,
        extra=extra,
        untrained=any(row.trained is False for row in report.rows),
        columns=[metric for metric in report.metrics if metric != report.metric],
    )


def _lines(rows: list[Row]) -> list[tuple[list[str], bool]]:
    """Cells of each row without the model's name, and whether its width was left untrained."""
    return [(table.cells(row)[1:], row.trained is False) for row in rows]


def _summary(report: "Report") -> list[tuple[str, str, str]]:
    """The figures at the head of the page: (number, what it is, detail)."""
    mine = sorted(report.select(model=report.model, code="float32"), key=lambda row: row.width)
    whole = mine[-1]
    found = [
        (f"{whole.value:.4f}", f"{report.metric} at full width {whole.width}", f"{whole.low:.4f} to {whole.high:.4f}")
    ]
    small = next((row for row in mine if row.share >= 0.95), None)
    if small is not None and small.width < whole.width:
        found.append(
            (
                str(small.width),
                "dimensions keep 95 % of it",
                f"{small.share:.1%} kept, {whole.width / small.width:.3g} times smaller",
            )
        )
    compared = [row for row in mine if row.versus and row.width <= whole.width // 4]
    if compared:
        held = min(compared, key=lambda row: abs(row.width - whole.width // 8))
        other = str(held.versus).split(":")[0].removesuffix(f" {held.width}")
        gap, low, high = report.paired(held, str(held.versus))
        found.append(
            (
                table.signed(gap),
                f"{report.metric} against {other} at width {held.width}",
                f"{table.signed(low)} to {table.signed(high)}" + (", no difference shown" if low <= 0 <= high else ""),
            )
        )
    return found
