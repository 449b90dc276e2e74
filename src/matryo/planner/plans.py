"""What a planning run found: the frontier, what was rejected and why, and what to expect at the size to come."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.files import write_text
from matryo.core.plan import Plan
from matryo.planner.quantities import size, span
from matryo.planner.scaling import Measured, Predicted

GROWS = (
    "; recall at a fixed shortlist falls as items are added, so the shortlist for {:,} is extrapolated: calibrate the "
    "full index"
)


@dataclass(frozen=True)
class Row:
    """One plan that reaches the recall."""

    plan: Plan
    """As measured on the sample."""
    planned: Plan
    """With the shortlist to be expected at `predicted.items`."""
    recall: float
    """Mean recall@k over the queries, on the sample."""
    bound: float
    """The expected recall on the sample is at least this, at the confidence, for all rows at once."""
    bytes_per_item: float
    """Of codes, in memory. Full vectors lie on the disk."""
    measured: tuple[Measured, ...]
    """Every size it was measured at, ascending."""
    predicted: Predicted
    error: tuple[float, float] | None
    """Relative error of predicted milliseconds and code bytes at the largest size, from lines fitted without it."""

    @property
    def last(self) -> Measured:
        """The largest size."""
        return self.measured[-1]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "plan": str(self.plan), "planned": str(self.planned)}


@dataclass(frozen=True)
class Rejected:
    """A plan that is not on the frontier, and why."""

    plan: str
    reason: str


@dataclass(frozen=True)
class Plans:
    """The result of `plan`. `frontier` runs from the fewest bytes to the quickest."""

    frontier: tuple[Row, ...]
    rejected: tuple[Rejected, ...]
    advice: str
    """Why there is no best plan; empty where there is one."""
    choice: Row | None
    width_alone: int | None
    """Smallest width measured whose float32 prefix reaches the recall without a rerank."""
    width_reranked: int | None
    """The same with 10 k candidates put in order by the full width."""
    facts: dict[str, Any]

    @property
    def best(self) -> Row:
        """The recommendation. InputError where no plan meets memory and latency; says what does come near."""
        if self.choice is None:
            raise InputError(self.advice)
        return self.choice

    def to_json(self) -> str:
        """Everything."""
        content = {
            "best": self.choice.as_json() if self.choice else None,
            "advice": self.advice,
            "frontier": [row.as_json() for row in self.frontier],
            "rejected": [asdict(row) for row in self.rejected],
            "width_alone": self.width_alone,
            "width_reranked": self.width_reranked,
            **self.facts,
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def to_yaml(self) -> str:
        """The recommendation as `matryo index build --plan plan.yaml` reads it; the figures are for the reader."""
        row, facts = self.best, self.facts
        lines: dict[str, Any] = {
            "plan": str(row.planned),
            "width": row.plan.width,
            "k": facts["k"],
            "recall": facts["recall"],
            "confidence": facts["confidence"],
            "measured": {
                "plan": str(row.plan), "items": row.last.items, "queries": facts["queries"],
                "recall": round(row.recall, 4), "at_least": row.bound, "ms": round(row.last.ms, 4),
            },
            "predicted": {
                "items": row.predicted.items, "ms": round(row.predicted.ms, 4),
                "memory_bytes": round(row.predicted.code_bytes), "disk_bytes": round(row.predicted.disk_bytes),
                "build_s": round(row.predicted.build_s, 1),
            },
        }  # fmt: skip
        head = "# Made by `matryo plan`. Calibrate the built index: matryo index calibrate INDEX --queries ...\n"
        # A JSON value is a YAML value, so that text needs no quoting rules of ours.
        return head + "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items())

    def table(self) -> str:
        """Frontier and advice for a terminal."""
        names = (
            "plan at this size", "recall", "at least", "bytes/item", "ms", "10-90 %", "ms then", "memory then",
            "built then",
        )  # fmt: skip
        cells = [cells_of(row) for row in self.frontier]
        sizes = [max(len(line[c]) for line in [names, *cells]) for c in range(len(names))]
        lines = [
            "  ".join(
                cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, sizes, strict=True))
            )
            for line in [names, *cells]
        ]
        return "\n".join([*lines, "", *self.notes()])

    def notes(self) -> list[str]:
        """What the figures mean, and how far they can be trusted."""
        facts = self.facts
        items, sample = facts["items"], facts["sample"]
        said = [self.advice or f"best for {items:,} items: {self.best.planned}"]
        for width, how in (
            (self.width_alone, "alone"),
            (self.width_reranked, f"with {10 * facts['k']} candidates reranked"),
        ):
            said.append(
                f"dimensions: a float32 prefix of {width} of {facts['width']} reaches recall {facts['recall']:g} {how}"
                if width and width < facts["width"]
                else f"dimensions: no prefix shorter than the full width reaches recall {facts['recall']:g} {how}"
            )
        said.append(
            f"'at least' holds at confidence {facts['confidence']:g} for all rows at once, for {facts['asked']}, "
            f"on the {sample:,} items of the sample" + ("" if items == sample else GROWS.format(items))
        )
        if items != sample and self.choice is not None:
            said.append(f"'then' is at {items:,} items, by {facts['model']}")
        if items != sample and len(facts["sizes"]) == 1:
            said.append(
                "the budget allowed one size, so that all of it is taken to grow in proportion: give more seconds"
            )
        errors = [row.error for row in self.frontier if row.error]
        if errors:
            worst = [max(abs(error[n]) for error in errors) for n in (0, 1)]
            said.append(
                f"left out of the fit, {sample:,} items were predicted within {worst[0]:.0%} of their milliseconds and "
                f"{worst[1]:.0%} of their memory"
            )
        return said

    def save(self, path: str | Path) -> Path:
        """Write `.html` (the page), `.yaml` (what `index build` takes) or `.json` (everything)."""
        path = Path(path)
        if path.suffix == ".html":
            text = self._html()
        elif path.suffix in (".yaml", ".yml"):
            text = self.to_yaml()
        elif path.suffix == ".json":
            text = self.to_json() + "\n"
        else:
            raise InputError(f"{path}: plans are saved as .html, .yaml or .json")
        write_text(path, text)
        return path

    def _html(self) -> str:
        try:
            from matryo.planner.page import as_html
        except ImportError as error:
            raise MissingExtraError("matplotlib", "eval", "the page of plans") from error
        return as_html(self)


def cells_of(row: Row) -> Sequence[str]:
    """A line of the table."""
    last = row.last
    return (
        str(row.plan),
        f"{row.recall:.4f}",
        f"{row.bound:.4f}",
        f"{row.bytes_per_item:.0f}",
        f"{last.ms:.2f}",
        f"{last.ms_low:.2f}-{last.ms_high:.2f}",
        f"{row.predicted.ms:.2f}",
        size(row.predicted.code_bytes),
        span(row.predicted.build_s),
    )
