"""The report: rows with intervals, raw values per query, and the ways to look at them."""

import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.files import write_text
from matryo.core.labelled import LabelledTask
from matryo.core.records import Retrieval
from matryo.evaluation.rows import Interval, Row, Statistics
from matryo.evaluation.scoring import Cell
from matryo.evaluation.systems import Task

FORMAT = 1
"""Version of the JSON a report writes."""


@dataclass(frozen=True)
class Section:
    """An extra section of the page: text, or a table with headers. Everything in it is shown as text, never as HTML."""

    title: str
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""


class Report:
    """What `evaluate` found.

    Attributes:
        rows: flat, metric by metric; the model first, then what it is held against.
        per_query: label -> metric -> one raw number per query (for STS the cosine per pair), in the order of `items`.
        items: the query ids (for STS the row numbers).
        metric: what rows are compared by.
        notes: how the rows were made, as sentences.
    """

    def __init__(
        self,
        model: str,
        task: Task | LabelledTask,
        rows: list[Row],
        cells: Sequence[Cell],
        found: Statistics,
        notes: list[str],
        command: str | None = None,
    ) -> None:
        self.model = model
        self.rows = rows
        self.notes = notes
        self.metric = rows[0].metric
        self.command = command
        self.per_query: dict[str, dict[str, NDArray[np.float64]]] = {cell.label: cell.values for cell in cells}
        self.task = task.name
        self.full = cells[0].system.full
        if isinstance(task, Retrieval):
            self.kind, self.items = "retrieval", list(task.query_ids)
            self.counts = {
                "queries": len(task.queries),
                "documents": len(task.documents),
                "judged pairs": len(task.judged.queries),
            }
            if blank := len(task.documents) - len(task.written):
                self.counts["blank documents"] = blank
        elif isinstance(task, LabelledTask):
            self.kind, self.items = "labelled", [str(n) for n in range(len(task.test_labels))]
            self.counts = {
                "test items": len(task.test_labels),
                "train items": len(task.train_labels),
                "classes": len(task.classes),
            }
        else:
            self.kind, self.items = "scored pairs", [str(n) for n in range(len(task.scores))]
            self.counts = {"pairs": len(task.scores)}
        self._found = found

    def select(self, metric: str | None = None, model: str | None = None, code: str | None = None) -> list[Row]:
        """Rows of one metric (the main one by default), of one system and code where given."""
        wanted = metric or self.metric
        if wanted not in {row.metric for row in self.rows}:
            raise InputError(f"metric {wanted!r} was not recorded; use one of {', '.join(self.metrics)}")
        return [
            row for row in self.rows if row.metric == wanted and model in (None, row.model) and code in (None, row.code)
        ]

    @property
    def metrics(self) -> list[str]:
        """The metrics recorded, the main one first."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    @property
    def models(self) -> list[str]:
        """The systems measured, the model first."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def paired(self, a: str | Row, b: str | Row, metric: str | None = None) -> Interval:
        """(a - b, low, high): the paired difference of two rows over the same resamples of queries.

        Rows are given as such or by label, `MiniLM 64:int8`; a label without a code means float32.
        """
        wanted = metric or self.metric
        return self._found.difference(self._label(a, wanted), self._label(b, wanted), wanted)

    def smallest(self, share: float = 0.95, metric: str | None = None) -> list[Row]:
        """The sub-networks that keep at least this share of the whole model's quality, none with another below it.

        A row counts if the lower bound of its share reaches `share` (each row's own interval: the more rows, the
        likelier it is that one of them is lucky). Of those, the ones that no other equals or beats in layers and bytes
        both; the fewest layers first. Depth is what encoding costs, bytes are what an index holds.

        Raises:
            InputError: `share` outside 0..1.
        """
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise InputError(f"share must be above 0 and at most 1, got {share!r}")
        mine = [r for r in self.select(metric) if r.model == self.model or r.depth is not None]
        # The whole model, whose depth is not said, lies above all others.
        good = sorted((r for r in mine if r.share_low >= share), key=lambda r: (r.depth or math.inf, r.bytes))
        found: list[Row] = []
        for row in good:
            if not any(other.bytes <= row.bytes for other in found):
                found.append(row)
        return found

    def _label(self, row: str | Row, metric: str) -> str:
        if isinstance(row, Row):
            return row.label
        known = {r.label for r in self.select(metric)}
        for label in (row, f"{row}:float32"):
            if label in known:
                return label
        raise InputError(f"no row {row!r}; labels look like {sorted(known)[0]!r}")

    def facts(self) -> dict[str, Any]:
        """Everything besides the rows that a reader needs to judge or repeat the report."""
        how = self._found.resampling
        packages = ("matryo", "numpy", "scikit-learn", "matplotlib")
        return {
            "model": self.model,
            "width": self.full,
            "task": self.task,
            "kind": self.kind,
            "counts": self.counts,
            "metric": self.metric,
            "interval": f"{how.confidence:.0%} percentile bootstrap",
            "confidence": how.confidence,
            "resamples": how.resamples,
            "seed": how.seed,
            "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
            "machine": f"{platform.system()} {platform.machine()}",
            "command": self.command,
            "notes": self.notes,
        }

    def table(self, metric: str | None = None) -> str:
        """The rows of one metric as text, for a terminal."""
        from matryo.evaluation.table import as_text

        return as_text(self, metric)

    def to_json(self, per_query: bool = False) -> str:
        """Facts and rows as JSON; with `per_query` the raw values too, from which every number can be made again."""
        content: dict[str, Any] = {
            "format": FORMAT,
            **self.facts(),
            "rows": [{"label": row.label, **{k: _plain(v) for k, v in asdict(row).items()}} for row in self.rows],
        }
        if per_query:
            content["items"] = self.items
            content["per_query"] = {
                label: {metric: [_plain(v) for v in values.tolist()] for metric, values in columns.items()}
                for label, columns in self.per_query.items()
            }
        return json.dumps(content, indent=1 if not per_query else None, allow_nan=False, ensure_ascii=False)

    def save(self, path: str | Path, extra: Sequence[Section] = ()) -> Path:
        """Write `.html` (one file, `extra` sections last), `.json` (raw values too) or `.txt`; all or nothing."""
        path = Path(path)
        check_kind(path)
        if path.suffix == ".html":
            with _extra("jinja2 and matplotlib", "the report page"):
                from matryo.evaluation.page import as_html

                text = as_html(self, extra)
        elif path.suffix == ".json":
            text = self.to_json(per_query=True)
        else:
            text = self.table()
        write_text(path, text + "\n")
        return path

    def figure(self, path: str | Path) -> Path:
        """Quality against width, as `.png` or `.svg`, for a model card."""
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise InputError(f"{path}: a figure is saved as .png or .svg")
        with _extra("matplotlib", "the figure"):
            from matryo.evaluation.charts import save_quality

            save_quality(self, path)
        return path

    def __repr__(self) -> str:
        return f"Report({self.model!r} on {self.task!r}: {len(self.rows)} rows, {self.metric})"


def check_kind(path: Path) -> None:
    """Raise unless a report can be saved under this name."""
    if path.suffix not in (".html", ".json", ".txt"):
        raise InputError(f"{path}: a report is saved as .html, .json or .txt")


@contextmanager
def _extra(package: str, what: str) -> Iterator[None]:
    """Turn a missing drawing package into the error that names the extra."""
    try:
        yield
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError(package, "eval", what) from error


def _plain(value: Any) -> Any:
    """JSON has no NaN: an undefined number is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str:
    if package == "matryo":
        return str(sys.modules["matryo"].__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
