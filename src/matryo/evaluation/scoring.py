"""Scoring one system at every width and code, down to one number per query and metric.

How a code is scored: float16, bfloat16 and int8 compare the query as it is (float32) with the decoded document, as a
flat scan of such an index does. `binary` compares signs with signs (Hamming), as the first stage of a funnel does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matryo.core.codecs import codec
from matryo.core.metrics import Metric, measure
from matryo.core.prefix import truncate
from matryo.core.ranking import ranks_in_task
from matryo.core.records import Retrieval
from matryo.evaluation.systems import System, Task

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]

COSINE = "cosine"
"""The raw value kept per sentence pair."""


@dataclass(frozen=True)
class Cell:
    """One system at one width in one code, with its raw values: metric -> one number per query (or pair)."""

    system: System
    width: int
    code: str
    bytes: int
    values: dict[str, Float64s]

    @property
    def label(self) -> str:
        """How the report names it, for example `MiniLM 64:int8`."""
        return f"{self.system.name} {self.width}:{self.code}"


def score(system: System, task: Task, codes: Sequence[str], metrics: Sequence[Metric]) -> Iterator[Cell]:
    """Every width of a system in every code, float32 first and from one product for all widths."""
    for code in codes:
        if code == "float32":
            yield from _float_cells(system, task, metrics)
            continue
        for width in system.widths:
            if code == "binary" and width % 8:
                continue
            first, second, size = coded(system, width, code)
            if isinstance(task, Retrieval):
                ranks = ranks_in_task(task, first, second, [width])[width]
                values = {str(m): measure(m, ranks, task.judged) for m in metrics}
            else:
                values = {COSINE: cosines_at_widths(first, second, [width])[width]}
            yield Cell(system, width, code, size, values)


def _float_cells(system: System, task: Task, metrics: Sequence[Metric]) -> Iterator[Cell]:
    if isinstance(task, Retrieval):
        for width, ranks in ranks_in_task(task, system.first, system.second, system.widths).items():
            values = {str(m): measure(m, ranks, task.judged) for m in metrics}
            yield Cell(system, width, "float32", 4 * width, values)
    else:
        for width, cosines in cosines_at_widths(system.first, system.second, system.widths).items():
            yield Cell(system, width, "float32", 4 * width, {COSINE: cosines})


def coded(system: System, width: int, code: str) -> tuple[Float32s, Float32s, int]:
    """Both columns as they are compared under a code, and the bytes one stored vector takes. Cut first, then fit."""
    first, second = truncate(system.first, width), truncate(system.second, width)
    fitted = codec(code, width).fit(second)
    if code == "binary":
        # Signs as +-1 and not +-1/sqrt(width): their products are whole numbers, so that equal distances tie exactly.
        return np.where(first > 0, 1, -1).astype(np.float32), np.where(second > 0, 1, -1).astype(np.float32), width // 8
    return first, fitted.decode(fitted.encode(second)), fitted.bytes_per_item


def cosines_at_widths(first_QD: Float32s, second_QD: Float32s, widths: Sequence[int]) -> dict[int, Float64s]:
    """Cosine of row q of one side with row q of the other at each width (rising); 0 where a prefix is all zeros."""
    found: dict[int, Float64s] = {}
    done = 0
    products, first_squares, second_squares = np.zeros((3, len(first_QD)))
    for width in widths:
        a, b = first_QD[:, done:width], second_QD[:, done:width]
        for total, x, y in ((products, a, b), (first_squares, a, a), (second_squares, b, b)):
            total += np.einsum("qd,qd->q", x, y, dtype=np.float64)
        lengths = np.sqrt(first_squares * second_squares)
        found[width] = np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        done = width
    return found
