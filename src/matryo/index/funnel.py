"""Executing a plan: scan the first stage, narrow the shortlist stage by stage, order what is left by exact scores.

Letters in array names: Q queries, D full width, N rows of the index, R rows of a shortlist.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.plan import Plan, Stage

Float32s = NDArray[np.float32]
Rows = NDArray[np.int64]

# What this engine can do, as data: a test walks it, and `check_plan` refuses everything else.
CODES = ("float32", "float16", "bfloat16", "int8", "int4", "binary", "rabitq", "pq<bytes>")
SCANS = {"flat": CODES, "hnsw": ("float32", "float16", "bfloat16", "int8", "int4"), "ivf": CODES}
"""Which codes each scan runs over."""

ROUNDING = 1e-6
"""Below the difference of any two Hamming distances as cosines, above what float32 makes of equal ones."""
SAMPLED = 1 << 12
"""Costs, evenly spread over all, that give a first limit."""


class Source(Protocol):
    """Where candidates come from. Rows are int64, ascending; scores are float32, larger is better."""

    @property
    def width(self) -> int:
        """Full width D."""

    @property
    def count(self) -> int:
        """Rows that may come back."""

    def scan(self, stage: Stage, queries_QD: Float32s, n: int) -> Sequence[tuple[Float32s | None, Rows]]:
        """For each query the n best rows by this stage's code, with scores (all rows, and None for their scores, where
        there are fewer than n).

        A float32 scan of full width may hand on a few more: every row that rounding cannot tell from the n-th.
        """

    def rescore(self, stage: Stage, query_D: Float32s, rows_R: Rows) -> Float32s:
        """Scores of these rows by this stage's code; right up to a positive factor per query."""

    def exact(self, query_D: Float32s, rows_R: Rows) -> Float32s:
        """Full-width cosines of these rows; the same row gets the same bits whatever stands around it."""


@dataclass(frozen=True)
class StageReport:
    """What one stage did, summed over the queries."""

    stage: str
    considered: int
    kept: int
    milliseconds: float
    each: list[int]
    """Candidates handed on, query by query; they differ where a stage keeps those within a distance."""


def check_plan(plan: Plan, full: int) -> Plan:
    """The plan, if this index can run it on vectors of `full` dimensions; else an InputError that says what it can."""
    plan.check(full)
    for n, stage in enumerate(plan.stages, start=1):
        kind = "pq<bytes>" if stage.code.startswith("pq") else stage.code
        problem = product_problem(stage.width, int(stage.code[2:])) if kind == "pq<bytes>" else ""
        if kind not in SCANS[stage.scan]:
            problem = f"{stage.scan} runs over {', '.join(SCANS[stage.scan])}"
        if stage.code == "rabitq" and dict(stage.options).get("at", stage.width) < stage.width:
            problem = "rabitq is coded about the cells' centres, which have the stage's width; leave `at` out"
        if stage.within is not None and _is_exact(stage, full):
            problem = "the exact scan knows its answers; leave `within` out"
        if problem:
            raise InputError(f"stage {n} ({stage}): {problem}; for example '{default_plan(full)}'")
    return plan


def default_plan(width: int) -> Plan:
    """A safe plan for vectors nobody has measured: bits of a wide prefix, then exact scores of 400 rows.

    The prefix is the largest power of two up to the full width, at most 512: Hamming distances over 64, 128, 256 or
    512 bits are what the processor does fastest, and 512 bits held recall on the hardest spectrum we measured.
    """
    if width < 64:
        return Plan((Stage(width, "float32"),))
    bits = min(512, 1 << (width.bit_length() - 1))
    return Plan((Stage(bits, "binary", keep=400), Stage(width, "float32")))


def run(
    plan: Plan, queries_QD: Float32s, k: int, source: Source, reports: list[StageReport] | None = None
) -> list[tuple[Rows, Float32s]]:
    """The k best rows of each query with their exact full-width cosines, best first, the lower row first among equals.

    A stage hands on `keep` rows, but never fewer than k; with `within` those of them that score within so much of the
    k-th. The last stage hands on its own `keep` if it has one, else k.
    When the last stage is the full width in float32 it is the final order itself; otherwise what it hands on is put in
    order by exact scores once more.

    Args:
        plan: checked by `check_plan`.
        queries_QD: unit rows of full width.
        k: at least 1.
        reports: filled with one report per stage when given.
    """
    first, *later = plan.stages
    explain = reports is not None
    started = time.perf_counter()
    found = source.scan(first, queries_QD, max(first.keep or k, k))
    shortlists = [stopped(scores, rows, k, first.within) for scores, rows in found]
    _report(reports, first, source.count * len(queries_QD) if explain else 0, shortlists, started)
    for stage in later:
        if _is_exact(stage, source.width) and stage is plan.stages[-1]:
            break  # the final ordering below is this stage
        started, before = time.perf_counter(), _total(shortlists)
        n = max(stage.keep or k, k)
        shortlists = [
            rows[best(-source.rescore(stage, query, rows), n)] if len(rows) > n else rows
            for query, rows in zip(queries_QD, shortlists, strict=True)
        ]
        _report(reports, stage, before, shortlists, started)
    started = time.perf_counter()
    answers = [finish(query, rows, k, source) for query, rows in zip(queries_QD, shortlists, strict=True)]
    final = Stage(source.width, "float32")
    _report(reports, final, _total(shortlists), [rows for rows, _ in answers], started)
    return answers


def stopped(scores_R: Float32s | None, rows_R: Rows, k: int, within: float | None) -> Rows:
    """The rows that score within so much of the k-th best of them; all where no distance is given."""
    if within is None or scores_R is None or len(rows_R) <= k:
        return rows_R
    edge = np.partition(scores_R, -k)[-k]
    kept: Rows = rows_R[scores_R >= edge - np.float32(within + ROUNDING)]
    return kept


def finish(query_D: Float32s, rows_R: Rows, k: int, source: Source) -> tuple[Rows, Float32s]:
    """The k best of these ascending rows by exact full-width cosine, best first, the lower row first among equals."""
    scores = source.exact(query_D, rows_R)
    order = np.argsort(-scores, kind="stable")[:k]
    return rows_R[order], scores[order]


def product_problem(width: int, size: int) -> str:
    """Why `pq<size>` cannot code this width, and what could; empty when it can."""
    if size >= 1 and width % (2 * size) == 0:
        return ""
    right = [f"pq{n}" for n in range(1, width // 2 + 1) if width % (2 * n) == 0][-4:]
    instead = ", ".join(right) if right else "an even width"
    return f"pq{size} cuts a prefix into {2 * size} equal parts, which {width} dimensions do not give; use {instead}"


def lengths(plan: Plan, queries_QD: Float32s, k: int, source: Source) -> NDArray[np.int64]:
    """(Q,) candidates that the stages of a plan hand on to the next, together; not the k answers."""
    reports: list[StageReport] = []
    run(plan, queries_QD, k, source, reports)
    each = np.array([report.each for report in reports[:-1]], dtype=np.int64).reshape(-1, len(queries_QD))
    total: NDArray[np.int64] = each.sum(axis=0)
    return total


def best(costs_N: NDArray[Any], n: int, slack: float = 0.0) -> Rows:
    """Positions of the n lowest costs, ascending; among equals at the edge the lower position.

    The largest value of the costs' type marks a position that is not allowed; it never comes back. With `slack` every
    position whose cost is within it of the n-th comes back too.
    """
    if n >= len(costs_N):
        return np.flatnonzero(costs_N < barred_cost(costs_N))
    limit = _limit(costs_N, n)
    if limit is not None:
        # Comparing is quicker than selecting, and what is left to select from is little more than n.
        among = np.flatnonzero(costs_N <= (limit + costs_N.dtype.type(slack) if slack else limit))
        left = costs_N[among]
        if (np.count_nonzero(left <= limit) if slack else len(left)) >= n:
            return among[_selected(left, n, slack)]
    return _selected(costs_N, n, slack)


def sparse_flatnonzero(mask_N: NDArray[np.bool_]) -> Rows:
    """`np.flatnonzero` for long masks of which few are true: eight that are not are passed over at once."""
    whole = len(mask_N) & ~7
    eights = mask_N[:whole].view(np.uint64)
    some = np.flatnonzero(eights != 0)
    within = np.flatnonzero(eights[some].view(np.bool_))
    return np.concatenate([8 * some[within >> 3] + (within & 7), whole + np.flatnonzero(mask_N[whole:])])


class Lowest:
    """The n lowest of costs that come piece by piece, in the order of their positions: what `best` gives of all."""

    def __init__(self, n: int) -> None:
        self.n, self.limit = n, None
        self._costs: list[NDArray[Any]] = []
        self._positions: list[Rows] = []
        self._held = 0

    def add(self, costs_C: NDArray[Any], first: int) -> None:
        """The costs of positions first, first + 1, ..., all of them beyond those before."""
        if self._held >= (self.n if self.limit is None else 2 * self.n):
            self._narrow()
        # A later position that ties with the n-th so far loses to it.
        chosen = best(costs_C, self.n) if self.limit is None else sparse_flatnonzero(costs_C < self.limit)
        self._costs.append(costs_C[chosen])
        self._positions.append(chosen + first)
        self._held += len(chosen)

    def found(self) -> tuple[NDArray[Any], Rows]:
        """Costs and positions, ascending by position."""
        if len(self._costs) > 1:
            self._narrow()
        return self._costs[0], self._positions[0]

    def _narrow(self) -> None:
        costs, positions = np.concatenate(self._costs), np.concatenate(self._positions)
        kept = best(costs, self.n)
        self._costs, self._positions, self._held = [costs[kept]], [positions[kept]], len(kept)
        if len(kept) == self.n:
            self.limit = costs[kept].max()


def _limit(costs_N: NDArray[Any], n: int) -> Any:
    """A cost that the n-th lowest hardly ever exceeds, from a sample of all; None where little would be won."""
    step = len(costs_N) // SAMPLED
    expected = n / max(step, 1)
    rank = int(expected + 4 * math.sqrt(expected) + 4)
    if step < 2 or 4 * rank > SAMPLED:
        return None
    limit = np.partition(costs_N[::step], rank)[rank]
    return limit if limit < barred_cost(costs_N) else None


def _selected(costs_N: NDArray[Any], n: int, slack: float) -> Rows:
    """The positions that `best` promises, by putting the n-th lowest cost in its place."""
    barred = barred_cost(costs_N)
    if n >= len(costs_N):
        return np.flatnonzero(costs_N < barred)
    edge = np.partition(costs_N, n - 1)[n - 1]
    if edge == barred:
        return np.flatnonzero(costs_N < barred)
    if slack:
        return np.flatnonzero(costs_N <= edge + costs_N.dtype.type(slack))
    among = np.flatnonzero(costs_N <= edge)
    if len(among) > n:
        ties = costs_N[among] == edge
        below = among[~ties]
        among = np.concatenate([below, among[ties][: n - len(below)]])
        among.sort()
    return among


def barred_cost(costs: NDArray[Any]) -> float | int:
    """The cost that marks a position as not allowed."""
    return np.inf if costs.dtype.kind == "f" else int(np.iinfo(costs.dtype.type).max)


def _is_exact(stage: Stage, full: int) -> bool:
    return stage.width == full and stage.code == "float32"


def _total(shortlists: list[Rows]) -> int:
    return sum(len(rows) for rows in shortlists)


def _report(
    reports: list[StageReport] | None, stage: Stage, considered: int, after: list[Rows], started: float
) -> None:
    if reports is not None:
        took, each = (time.perf_counter() - started) * 1e3, [len(rows) for rows in after]
        reports.append(StageReport(str(stage), considered, sum(each), took, each))
