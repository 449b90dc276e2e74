"""One plan on one sample: its shortlist calibrated, its searches timed, its bytes counted. All through `Index`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.files import storage_errors
from matryo.core.plan import Plan, Stage
from matryo.core.promise import Floats, smallest
from matryo.index import FolderIndex
from matryo.index.calibration import ladder_of
from matryo.index.codes import by_bounds, held_as
from matryo.index.column import Column
from matryo.index.rerank import inner_products
from matryo.index.scans.bounds import NAME as BOUNDS
from matryo.index.scans.bounds import Bounds
from matryo.index.scans.flat import flat_index, scan_column
from matryo.index.vectors import Block, Vectors, row_bytes
from matryo.planner.scaling import Measured

Float32s = NDArray[np.float32]
TIMED = 12
"""Queries timed at a time, after which the next plan takes its turn."""
TURNS = 4
REPEATED, REPEATED_BYTES = 8, 1 << 28
"""How many times a sample's codes are repeated at most (more copies would tie in a shortlist), and to how many bytes
codes and vectors are."""
FEW = 60
"""Queries that size a shortlist while plans are compared; all of them make the promise, at the end."""


@dataclass(frozen=True)
class Target:
    """What every plan must reach."""

    k: int
    recall: float
    confidence: float


@dataclass
class Trial:
    """A plan opened on a sample, ready to be timed."""

    plan: Plan
    index: FolderIndex
    least: int
    """Shortest first shortlist whose mean recall over a few queries will do."""
    build_s: float
    recalls: Floats | None = None
    """Of all queries, once promised."""
    times: list[tuple[float, float, float]] = field(default_factory=list)
    """Milliseconds of the call, of its first stage, and of the later ones, a row per query."""


class Sample:
    """The first `count` rows of the shuffled vectors in an index of their own, and the exact answers' k-th scores.

    It stands for so many `items`: exact search goes by bounds here if it will there.
    """

    def __init__(self, folder: Path, rows_ND: Float32s, queries_QD: Float32s, target: Target, items: int) -> None:
        self.folder, self.queries, self.target, self.count = folder, queries_QD, target, len(rows_ND)
        self.items = items
        self.full = rows_ND.shape[1]
        with FolderIndex.create(folder, width=self.full, plan=f"{self.full}:float32") as index:
            for start in range(0, self.count, 50_000):
                part = rows_ND[start : start + 50_000]
                index.upsert([str(n) for n in range(start, start + len(part))], part)
            exact = index.search(queries_QD, target.k, plan=Plan((Stage(self.full, "float32"),)))
        self._repeated: Vectors | None = None
        self.edges = np.array([scores[-1] for scores in exact.scores])

    def recalls(self, index: FolderIndex, plan: Plan, few: int | None = None) -> Floats:
        """(Q,) share of the exact k best, of the first few queries or all; equal scores stand for one another."""
        hits = index.search(self.queries[:few], self.target.k, plan=plan)
        found = [np.count_nonzero(np.array(s) >= edge) for s, edge in zip(hits.scores, self.edges[:few], strict=True)]
        return np.asarray(found, dtype=np.float64) / self.target.k

    def attempt(self, plan: Plan, guess: int | None = None) -> Trial:
        """The plan with the shortest shortlists that do for a few queries. InputError where none will.

        `guess` is a first shortlist to begin the search at; a good one saves more than half of it.
        """
        index = FolderIndex.open(self.folder, read_only=True)
        try:
            started = time.perf_counter()
            index.prepare(plan)
            if plan.stages[0] == Stage(self.full, "float32") and by_bounds(self.full, self.items):
                snapshot = index.snapshot()
                snapshot.codes.prepare(self.full, BOUNDS, snapshot.vectors)
            index.search(self.queries[0], self.target.k, plan=plan)
            build_s = time.perf_counter() - started
            ladder = ladder_of(plan, self.target.k, self.count, self.full)
            low, high, best, stride = -1, len(ladder), 0.0, 1
            middle = next((n for n, p in enumerate(ladder) if guess and (p.stages[0].keep or 0) >= guess), high // 2)
            while high - low > 1:
                found = float(self.recalls(index, ladder[middle], FEW).mean())
                best = max(best, found)
                low, high = (low, middle) if found >= self.target.recall else (middle, high)
                # From a guess in growing strides, and by halves once the answer lies between two rungs.
                beyond = guess is not None and (low < 0 or high == len(ladder))
                middle = (high - stride if low < 0 else low + stride) if beyond else (low + high) // 2
                middle, stride = min(max(middle, low + 1), high - 1), 2 * stride
            if high == len(ladder):
                raise InputError(f"reaches recall {best:.4f} with every item in its shortlist, on {self.count:,} items")
        except BaseException:
            index.close()
            raise
        return Trial(ladder[high], index, ladder[high].stages[0].keep or self.target.k, build_s)

    def promise(self, trial: Trial) -> None:
        """Give a trial the shortest shortlists that all queries show to be long enough. InputError where none is."""
        ladder = ladder_of(trial.plan, self.target.k, self.count, self.full)
        trial.plan, trial.recalls = smallest(
            ladder, lambda rung: self.recalls(trial.index, rung), self.target.recall, self.target.confidence
        )
        trial.times.clear()

    def time(self, trials: Sequence[Trial]) -> None:
        """Time single queries, the plans taking turns, so that they share what else the machine does."""
        for turn in range(TURNS):
            at = [n % len(self.queries) for n in range(turn * TIMED, (turn + 1) * TIMED)]
            for trial in trials:
                trial.index.search(self.queries[at[0]], self.target.k, plan=trial.plan)
                for n in at:
                    started = time.perf_counter()
                    hits = trial.index.search(self.queries[n], self.target.k, plan=trial.plan, explain=True)
                    took = (time.perf_counter() - started) * 1e3
                    first, *later = [stage.milliseconds for stage in hits.explanation or ()]
                    trial.times.append((took, first, sum(later)))

    def scan_growth(self, trial: Trial, items: int, turns: int = 1) -> tuple[float, float] | None:
        """Milliseconds that a further item adds to a flat scan, and a further row of its shortlist; None for what is
        not a flat scan of a column.

        The sample's codes lie in a cache that those of all items would not fit. So they are repeated, up to the items
        to come or REPEATED times or REPEATED_BYTES, and scanned beside the sample's own, in turns.
        """
        snapshot = trial.index.snapshot()
        first = trial.plan.stages[0]
        exact = first == Stage(self.full, "float32")
        column = snapshot.codes.loaded().get((first.width, BOUNDS if exact else held_as(first, first=True)))
        if not isinstance(column, Column) or not column.rows:
            return None
        row_bytes = column.nbytes // column.rows
        most = min(REPEATED * column.rows, max(2 * column.rows, REPEATED_BYTES // row_bytes))
        count = min(items, most)
        if count <= column.rows:
            return None
        larger = column.repeated(count)
        keep = first.keep or 4 * self.target.k + 64
        sides = {"sample": (column, keep), "longer": (larger, keep), "more": (larger, min(2 * keep, count))}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns):
            for name, (over, wanted) in sides.items():
                for n in range(TIMED):
                    query = self.queries[None, (turn * TIMED + n) % len(self.queries)]
                    asked = column.codec.queries(query) if isinstance(column.codec, Bounds) else query
                    started = time.perf_counter()
                    if exact:
                        flat_index(over, over.rows).search(asked, wanted)
                    else:
                        scan_column(over, asked, wanted, over.rows, None)
                    if n:  # the first of a turn fills the cache
                        times[name].append((time.perf_counter() - started) * 1e3)
        here, longer, more = (float(np.median(found)) for found in times.values())
        kept = sides["more"][1] - keep
        return max(0.0, longer - here) / (count - column.rows), max(0.0, more - longer) / kept if kept else 0.0

    def row_ms(self, trial: Trial, items: int, turns: int = 1) -> float:
        """Milliseconds that a row of the first shortlist adds to the last stage, once all vectors to come lie there.

        The sample's lie in a cache that all of them would not fit. So they are repeated in a file, up to the items to
        come or REPEATED_BYTES, and as many rows as the last stage puts in order are read from both, in turns.
        """
        snapshot, stages = trial.index.snapshot(), trial.plan.stages
        first, last = stages[0].keep, stages[-2].keep if len(stages) > 1 else None
        larger = self._longer(snapshot.vectors, items) if first and last else None
        if not first or not last or larger is None:
            return 0.0
        rng = np.random.default_rng(0)
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(turns):
            for long, vectors in ((False, snapshot.vectors), (True, larger)):
                for n in range(TIMED):
                    # Evenly spread: a query's rows are anywhere.
                    rows = (np.arange(last) + rng.random(last)) * (vectors.end / last)
                    query = self.queries[(turn * TIMED + n) % len(self.queries)]
                    started = time.perf_counter()
                    inner_products(vectors, query, rows.astype(np.int64))
                    if n:  # the first of a turn fills the cache
                        times[long].append((time.perf_counter() - started) * 1e3)
        return max(0.0, float(np.median(times[True]) - np.median(times[False]))) / first

    def _longer(self, vectors: Vectors, items: int) -> Vectors | None:
        """The sample's vectors again and again, mapped as an index maps them; None if no more are to come."""
        count = min(items, max(2 * vectors.end, REPEATED_BYTES // row_bytes(vectors.store, vectors.width)))
        if count <= vectors.end:
            return None
        if self._repeated is None or self._repeated.end != count:
            path = self.folder.with_suffix(".repeated")
            with storage_errors(f"writing {path}"), path.open("wb") as file:
                for start in range(0, count, vectors.end):
                    file.write(vectors.stored[: count - start].data)
            step = vectors.block_rows
            blocks = [Block(n // step, min(step, count - n), b"") for n in range(0, count, step)]
            self._repeated = Vectors(path, vectors.store, vectors.width, count, blocks)
            # Nobody else writes there.
            self._repeated.verified[:] = self._repeated.all_verified = True
        return self._repeated

    def measured(self, trial: Trial, turns: int = 1) -> Measured:
        """The medians of a timed trial, and how it grows towards the items to come."""
        stats: dict[str, Any] = trial.index.stats()
        whole, scan, after = np.array(trial.times).T
        low, middle, high = np.quantile(whole, [0.1, 0.5, 0.9])
        item_ms, kept_ms = self.scan_growth(trial, self.items, turns) or (None, 0.0)
        return Measured(
            self.count,
            trial.plan.stages[0].keep or self.target.k,
            trial.least,
            float(middle),
            float(low),
            float(high),
            float(np.median(scan)),
            float(np.median(after)),
            sum(stats["codes"].values()),
            stats["vector_bytes"],
            trial.build_s,
            item_ms,
            self.row_ms(trial, self.items, turns),
            kept_ms,
        )

    def enough_width(self, widths: Sequence[int], rerank: int | None) -> int | None:
        """The smallest width whose float32 prefix reaches the recall: alone, or with so many candidates put in order.

        Recall rises with the width but for noise; every width is tested at the target's confidence.
        """

        def plan_of(width: int) -> Plan:
            if width == self.full:
                return Plan((Stage(self.full, "float32"),))
            return Plan((Stage(width, "float32", keep=rerank), *([Stage(self.full, "float32")] if rerank else [])))

        with FolderIndex.open(self.folder, read_only=True) as index:
            try:
                width, _ = smallest(
                    sorted(widths),
                    lambda w: self.recalls(index, plan_of(w)),
                    self.target.recall,
                    self.target.confidence,
                )
            except InputError:
                return None
        return width
