"""A row of a report, and the step from raw values to rows with intervals and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matryo.evaluation.bootstrap import Resampling, mean_draws, spearman, spearman_draws
from matryo.evaluation.scoring import COSINE, Cell

Float64s = NDArray[np.float64]
Interval = tuple[float, float, float]
"""A value and its interval: (value, low, high)."""

SPEARMAN = "Spearman"


@dataclass(frozen=True)
class Row:
    """One measured quantity: a system at a width in a code, by one metric."""

    model: str
    width: int
    code: str
    bytes: int
    """Bytes one stored vector takes."""
    trained: bool | None
    """Whether this width was trained; None for projections, which are not trained."""
    metric: str
    value: float
    low: float
    high: float
    share: float
    """Value over the first model's at full width in float32 (nan where that is 0)."""
    share_low: float
    share_high: float
    versus: str | None = None
    """Label of the row this one is compared with in pairs."""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    depth: int | None = None
    """Layers that were run, where not all were."""

    @property
    def label(self) -> str:
        """For example `MiniLM 64:int8`."""
        return f"{self.model} {self.width}:{self.code}"


@dataclass(frozen=True)
class Statistics:
    """Point values and resampled values of every (label, metric), all over the same resamples."""

    values: dict[tuple[str, str], float]
    draws: dict[tuple[str, str], Float64s]
    resampling: Resampling

    def interval(self, label: str, metric: str) -> Interval:
        """A value with its interval."""
        return (self.values[label, metric], *self.resampling.interval(self.draws[label, metric]))

    def difference(self, a: str, b: str, metric: str) -> Interval:
        """a - b with the paired interval: both are read off the same resamples."""
        low, high = self.resampling.interval(self.draws[a, metric] - self.draws[b, metric])
        return self.values[a, metric] - self.values[b, metric], low, high

    def share(self, a: str, b: str, metric: str) -> Interval:
        """a / b with the paired interval; nan where b is 0."""
        below = self.values[b, metric]
        if below == 0:
            return float("nan"), float("nan"), float("nan")
        down = self.draws[b, metric]
        ratio = np.divide(self.draws[a, metric], down, out=np.full_like(down, np.nan), where=down != 0)
        return (self.values[a, metric] / below, *self.resampling.interval(ratio))


def statistics(cells: Sequence[Cell], gold: Float64s | None, resampling: Resampling) -> Statistics:
    """Means over queries, or Spearman's correlation with `gold` over pairs, with their resampled values."""
    if gold is None:
        keys = [(cell.label, metric) for cell in cells for metric in cell.values]
        columns = [values for cell in cells for values in cell.values.values()]
        points = [float(column.mean()) for column in columns]
        draws = mean_draws(columns, resampling)
    else:
        keys = [(cell.label, SPEARMAN) for cell in cells]
        columns = [cell.values[COSINE] for cell in cells]
        points = [spearman(column, gold) for column in columns]
        draws = spearman_draws(columns, gold, resampling)
    return Statistics(dict(zip(keys, points, strict=True)), dict(zip(keys, draws, strict=True)), resampling)


def rows_of(cells: Sequence[Cell], found: Statistics, metrics: Sequence[str], versus: Mapping[str, str]) -> list[Row]:
    """All rows, metric by metric. `cells[0].system` is the model whose full width is the yardstick."""
    model = cells[0].system
    whole = f"{model.name} {model.full}:float32"
    rows: list[Row] = []
    for metric in metrics:
        for cell in cells:
            if metric not in cell.values and metric != SPEARMAN:
                continue  # a code has no linear probe, a projection no trained head
            value, low, high = found.interval(cell.label, metric)
            other = versus.get(cell.label)
            gap = (
                (None, None, None)
                if other is None or (other, metric) not in found.values
                else found.difference(cell.label, other, metric)
            )
            trained = None if cell.system.trained is None else cell.width in cell.system.trained
            share, share_low, share_high = found.share(cell.label, whole, metric)
            difference, difference_low, difference_high = gap
            rows.append(
                Row(
                    cell.system.name, cell.width, cell.code, cell.bytes, trained, metric, value, low, high,
                    share, share_low, share_high, other if difference is not None else None,
                    difference, difference_low, difference_high, cell.system.depth,
                )
            )  # fmt: skip
    return rows


def comparisons(cells: Sequence[Cell], against: str | None) -> dict[str, str]:
    """Which row each row is compared with: label -> label.

    The model at a width is compared with `against` at that width; a code with the same width in float32; every other
    system with the model at that width. The same difference is thus read from either side.
    """
    labels = {cell.label for cell in cells}
    model = cells[0].system.name
    chosen: dict[str, str] = {}
    for cell in cells:
        if cell.code != "float32":
            other = f"{cell.system.name} {cell.width}:float32"
        elif cell.system.name == model:
            other = f"{against} {cell.width}:float32"
        else:
            other = f"{model} {cell.width}:float32"
        if other in labels:
            chosen[cell.label] = other
    return chosen
