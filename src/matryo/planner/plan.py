"""`plan`: measure codes x widths x scans x shortlists on a sample, drop the losers early, predict the rest at size."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.plan import Plan, Stage
from matryo.core.prefix import check_width, truncate
from matryo.core.promise import lower_bound, needed
from matryo.core.records import check_vectors
from matryo.index.calibration import with_keep
from matryo.planner.candidates import candidates, halves, least_bytes
from matryo.planner.plans import Plans, Rejected, Row
from matryo.planner.quantities import amount, size
from matryo.planner.scaling import Measured, held_out, predict
from matryo.planner.trial import TURNS, Sample, Target, Trial

Float32s = NDArray[np.float32]
Say = Callable[[str], None]

QUERIES = 500
"""Queries asked, at most; as many items are held out where there are no queries."""
FIRST = 2048
"""Items of the smallest sample, at most an eighth of all."""
MOST = 131_072
"""Items of the largest sample."""
GROWTH = 4
"""Ratio of neighbouring sample sizes."""
SHARE = 0.8
"""Of the budget is spent; the rest is for what was under way, and for the page."""
GROWING = 0.55
"""Of the budget is for growing samples; what is between the two is for the promises."""
KEPT = 6
"""Plans that go on to the next size at least."""
SLOWER = 1.15
"""Within this factor of the quickest the fewest bytes win: less is noise."""
BEATEN = 1.5
"""A plan is dropped early when one with no more bytes is expected to be this many times quicker at the size to come."""
BEATEN_AT_FIRST = 2.0
"""The same after the first sample, where what grows cannot be told yet."""


def plan(
    vectors: Any,
    queries: Any = None,
    k: int = 10,
    recall: float = 0.95,
    confidence: float = 0.95,
    items: int | str | None = None,
    memory: float | str | None = None,
    latency: float | str | None = None,
    budget: float | str = 120,
    *,
    widths: Sequence[int] | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> Plans:
    """The cheapest plans for these vectors that reach a recall on new queries, and one recommendation.

    Every first stage the index can run (code x width x scan, the full width among the widths) is measured on growing
    samples through `Index.search`, its shortlist calibrated as `Index.calibrate` does; what is beaten both in bytes and
    in time is dropped before the next, larger sample. The recall test shares its error over all plans compared
    (Bonferroni), so that the recommendation keeps its promise whichever plan it is. See `scaling` for the predictions.

    Args:
        vectors: (N, D) numbers, any lengths but zero; may be memory-mapped, only a sample of rows is read.
        queries: (Q, D) numbers, a sample of the users' queries. None holds out some of the items and asks those.
        items: how many items there will be, N unless said.
        memory: bytes for codes in memory at `items`, or text such as "2GB".
        latency: milliseconds of one search at `items`, or text such as "5ms".
        budget: seconds this may take, or text such as "120s". It stops well within.
        widths: widths to try; the full width and its halves unless said.
        say: called with a line for each sample.

    Returns:
        Plans. `.best` raises InputError where no plan meets `latency` within `memory`.

    Raises:
        InputError: too few queries, k not below N, NaN or zero rows, a memory below the floor (said), a budget too
            short for the smallest sample.
    """
    started = time.perf_counter()
    seconds = amount("budget", budget)
    rows, asked, held = _checked(vectors, queries, k, seed)
    full = rows.shape[1]
    chosen = halves(full) if widths is None else sorted({check_width(w, full) for w in widths} | {full}, reverse=True)
    wanted = len(rows) if items is None else int(amount("items", items))
    if wanted < len(rows) and items is not None:
        raise InputError(
            f"items is {wanted:,} but {len(rows):,} vectors were given; leave it out, or give fewer vectors"
        )
    contest = candidates(full, wanted, chosen)
    target = _target(k, recall, confidence, len(contest), len(asked))
    limit = None if memory is None else amount("memory", memory)
    if limit is not None:
        contest = _fitting(contest, wanted, limit)
    most = None if latency is None else amount("latency", latency)
    with tempfile.TemporaryDirectory(prefix="matryo-plan-") as folder:
        run = _Run(
            Path(folder),
            rows,
            asked,
            target,
            (started + GROWING * seconds, started + SHARE * seconds),
            wanted,
            say or (lambda _: None),
        )
        try:
            run.all_sizes(contest)
            alone, reranked = run.enough_width(chosen)
            found = run.rows()
        finally:
            run.close()
    facts = {
        "k": k, "recall": recall, "confidence": confidence, "width": full, "items": wanted,
        "vectors": len(rows), "sample": run.sizes[-1], "sizes": run.sizes, "queries": len(asked),
        "candidates": run.started,
        "asked": "held-out items as queries" if held else f"new queries like the {len(asked)} given",
        "memory": limit, "latency": most, "budget": seconds, "seconds": round(time.perf_counter() - started, 2),
        "model": "ms = scan (measured + b N + g shortlist, b and g over repeated codes; cells a + b N, graphs a N^b) + "
                 "after (c + d shortlist, d over repeated vectors) + rest; shortlist ~ N^f",
    }  # fmt: skip
    return _settled(found, run.rejected, limit, most, (alone, reranked), facts)


def _checked(vectors: Any, queries: Any, k: int, seed: int) -> tuple[Float32s, Float32s, bool]:
    """A shuffled sample of vectors, queries, and whether those are held-out items."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"k must be an integer of at least 1, got {k!r}")
    given = np.asarray(vectors)
    if given.ndim != 2 or given.dtype.kind not in "fiu":
        raise InputError(f"vectors: expected (N, D) numbers, got shape {given.shape} of {given.dtype}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(given))[: MOST + QUERIES]
    held = queries is None
    out = min(QUERIES, len(given) // 5) if held else 0
    if len(order) - out <= 4 * k:
        raise InputError(
            f"{len(given)} vectors are too few to plan for k={k}; give more than {4 * k + out}, or a smaller k"
        )
    # Read in the order they lie in, then shuffled.
    rows = np.empty((len(order), given.shape[1]), np.float32)
    rows[np.argsort(order)] = check_vectors(np.asarray(given[np.sort(order)], dtype=np.float32), "vectors (a sample)")
    rows = truncate(rows, rows.shape[1])
    if held:
        return rows[out:], rows[:out], True
    asked = np.asarray(queries)
    if asked.ndim != 2 or asked.dtype.kind not in "fiu" or asked.shape[1] != rows.shape[1]:
        raise InputError(f"queries: expected (Q, {rows.shape[1]}) numbers, got shape {asked.shape} of {asked.dtype}")
    asked = asked[rng.permutation(len(asked))[:QUERIES]]
    return rows[:MOST], truncate(check_vectors(asked.astype(np.float32), "queries"), rows.shape[1]), False


def _target(k: int, recall: Any, confidence: Any, plans: int, queries: int) -> Target:
    """The target with its error shared over the plans, if so many queries can show it."""
    for name, value in (("recall", recall), ("confidence", confidence)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise InputError(f"{name} must be a number between 0 and 1, got {value!r}")
    shared = 1 - (1 - confidence) / plans
    least = needed(recall, shared)
    if queries < least:
        raise InputError(
            f"{queries} queries cannot show recall >= {recall:g} at confidence {confidence:g} for {plans} plans at "
            f"once: even if each of them found everything it takes {least}; give at least {least}, or ask for less"
        )
    return Target(int(k), float(recall), shared)


def _fitting(contest: list[Plan], items: int, limit: float) -> list[Plan]:
    """The plans whose codes can fit, if there are any that scan codes at all."""
    floor = min(least_bytes(p) for p in contest if len(p.stages) > 1)
    if floor * items > limit:
        smallest = next(p for p in contest if len(p.stages) > 1 and least_bytes(p) == floor)
        raise InputError(
            f"memory {size(limit)} is below the floor: the smallest code, {smallest.stages[0].width}:"
            f"{smallest.stages[0].code}, takes {floor} bytes an item, {size(floor * items)} for {items:,} items; give "
            "at least that, or plan for fewer items"
        )
    return contest


class _Run:
    """Growing samples, fewer and fewer plans."""

    def __init__(
        self,
        folder: Path,
        rows: Float32s,
        queries: Float32s,
        target: Target,
        deadlines: tuple[float, float],
        items: int,
        say: Say,
    ) -> None:
        self.folder, self.all_rows, self.queries, self.target = folder, rows, queries, target
        (self.deadline, self.last_call), self.items, self.say = deadlines, items, say
        self.sizes: list[int] = []
        self.rejected: list[Rejected] = []
        self.history: dict[str, list[Measured]] = {}
        self.finished: list[tuple[str, Trial]] = []
        self.started = 0
        self.sample: Sample | None = None

    def all_sizes(self, contest: list[Plan]) -> None:
        """Measure at growing sizes until the rows or the time are used up."""
        alive, count, spent = contest, min(FIRST, max(4 * self.target.k, len(self.all_rows) // 8)), 0.0
        self.started = len(contest)
        while alive:
            began = time.perf_counter()
            # The next size takes up to GROWTH times as long a plan, much less while calls outweigh scans.
            if self.sizes and began + 1.3 * spent * len(alive) > self.deadline:
                break
            sample = Sample(self.folder / str(count), self.all_rows[:count], self.queries, self.target, self.items)
            known = len(self.rejected)
            done = self._one_size(sample, alive)
            if not done:
                # What was measured at the size before stands.
                del self.rejected[known if self.sizes else len(self.rejected) :]
                break
            for _, trial in self.finished:
                trial.index.close()
            self.finished, self.sample = done, sample
            self.sizes.append(count)
            took = time.perf_counter() - began
            spent = took / len(done)
            self.say(f"{count:,} items: {len(done)} plans measured in {took:.1f} s")
            if count == len(self.all_rows):
                break
            alive = self._survivors()
            # A last step of little more would show nothing new.
            count = GROWTH * count if 1.5 * GROWTH * count <= len(self.all_rows) else len(self.all_rows)
        if not self.sizes:
            raise InputError("the budget is too short to measure a single plan; give more seconds")
        self._promise()

    def _one_size(self, sample: Sample, alive: list[Plan]) -> list[tuple[str, Trial]]:
        done: list[tuple[str, Trial]] = []
        for number, plan in enumerate(alive):
            if time.perf_counter() > self.deadline:
                for late in alive[number:]:
                    self.reject(late, f"not measured at {sample.count:,} items: the budget was used up")
                break
            try:
                trial = sample.attempt(plan, self._expected(plan, sample.count))
            except InputError as error:
                self.reject(plan, str(error))
                continue
            done.append((name_of(plan), trial))
        sample.time([trial for _, trial in done])
        for name, trial in done:
            self.history.setdefault(name, []).append(sample.measured(trial))
        return done

    def _expected(self, plan: Plan, count: int) -> int | None:
        """The shortlist to be expected at this size, from the sizes before."""
        before = self.history.get(name_of(plan))
        if not before:
            return None
        return predict(before, count, plan.stages[0].scan == "hnsw").keep if len(before) > 1 else 2 * before[-1].least

    def _promise(self) -> None:
        """What is left gets its promise from all queries, the least beaten first for as long as there is time."""
        assert self.sample is not None
        costs = {name: self._cost(name, trial) for name, trial in self.finished}
        order = sorted(self.finished, key=lambda found: beaten(found[0], costs)[0])
        kept: list[tuple[str, Trial]] = []
        for name, trial in order:
            ratio, by = beaten(name, costs)
            try:
                if ratio > BEATEN:
                    raise InputError(f"'{by}' needs no more bytes and is expected to be {ratio:.1f} times quicker")
                if kept and time.perf_counter() > self.last_call:
                    raise InputError("its recall was not shown: the budget was used up")
                self.sample.promise(trial)
                kept.append((name, trial))
            except InputError as error:
                self.reject(name, str(error))
                trial.index.close()
        self.finished = kept
        self.sample.time([trial for _, trial in kept])
        for name, trial in kept:
            self.history[name][-1] = self.sample.measured(trial, TURNS)

    def _survivors(self) -> list[Plan]:
        """The better half by how far each is beaten at the size to come, and all that are not clearly beaten.

        From one size nobody can tell what grows: only what is far behind plans of no more bytes is dropped then.
        """
        costs = {name: self._cost(name, trial) for name, trial in self.finished}
        ranked = sorted(((*beaten(name, costs), name) for name in costs), key=lambda found: found[0])
        stay, limit = (max(KEPT, len(ranked) // 2), BEATEN) if len(self.sizes) > 1 else (KEPT, BEATEN_AT_FIRST)
        kept = {name for place, (ratio, _, name) in enumerate(ranked) if place < stay or ratio <= limit}
        for ratio, by, name in ranked:
            if name not in kept:
                at = f"at {self.items:,} items" if self.items > self.sizes[-1] else "here"
                self.reject(name, f"dropped after {self.sizes[-1]:,} items: '{by}' needs no more bytes and is expected "
                                  f"to be {ratio:.1f} times quicker {at}")  # fmt: skip
        for name, trial in self.finished:
            if name not in kept:
                trial.index.close()
        self.finished = [(name, trial) for name, trial in self.finished if name in kept]
        return [trial.plan for _, trial in self.finished]

    def _cost(self, name: str, trial: Trial) -> tuple[float, float]:
        """Bytes and milliseconds to be expected."""
        said = predict(self.history[name], self.items, trial.plan.stages[0].scan == "hnsw")
        return said.code_bytes, said.ms

    def reject(self, plan: Plan | str, reason: str) -> None:
        """Note why a plan is out."""
        self.rejected.append(Rejected(plan if isinstance(plan, str) else name_of(plan), reason))

    def rows(self) -> list[Row]:
        """What was measured at the largest size, with predictions."""
        found = []
        for name, trial in self.finished:
            sizes = self.history[name]
            graph = trial.plan.stages[0].scan == "hnsw"
            said = predict(sizes, self.items, graph)
            planned = (
                trial.plan if trial.plan.stages[0].keep is None else with_keep(trial.plan, said.keep, self.target.k)
            )
            if self.items == sizes[-1].items:
                planned = trial.plan
            assert trial.recalls is not None
            bound = lower_bound(trial.recalls, self.target.confidence)
            found.append(
                Row(
                    trial.plan,
                    planned,
                    float(trial.recalls.mean()),
                    bound,
                    sizes[-1].code_bytes / sizes[-1].items,
                    tuple(sizes),
                    said,
                    held_out(sizes, graph),
                )
            )
        return found

    def enough_width(self, widths: list[int]) -> tuple[int | None, int | None]:
        """Smallest width alone, and with 10 k candidates reranked; not looked for once the time is up."""
        full = self.all_rows.shape[1]
        step = max(8, full // 32)
        every = sorted({*widths, *range(step, full + 1, step), full})
        assert self.sample is not None
        if time.perf_counter() > self.last_call:
            return None, None
        return self.sample.enough_width(every, None), self.sample.enough_width(every, 10 * self.target.k)

    def close(self) -> None:
        """Close what is open."""
        for _, trial in self.finished:
            trial.index.close()


def name_of(plan: Plan) -> str:
    """A plan without its shortlist sizes, which change from sample to sample."""
    return " > ".join(str(Stage(s.width, s.code, s.scan, s.options)) for s in plan.stages)


def beaten(name: str, costs: dict[str, tuple[float, float]]) -> tuple[float, str]:
    """How many times quicker the quickest other plan with no more bytes is, and which that is."""
    size, ms = costs[name]
    return max(((ms / m, other) for other, (b, m) in costs.items() if other != name and b <= size), default=(0.0, ""))


def _settled(
    found: list[Row], rejected: list[Rejected], limit: float | None, most: float | None,
    widths: tuple[int | None, int | None], facts: dict[str, Any],
) -> Plans:  # fmt: skip
    """The frontier by bytes and time at the size to come, and the recommendation on it."""
    rejected, fits = list(rejected), []
    for row in found:
        if limit is not None and row.predicted.code_bytes > limit:
            takes = size(row.predicted.code_bytes)
            rejected.append(
                Rejected(str(row.plan), f"takes {takes} at {row.predicted.items:,} items, over {size(limit)}")
            )
        else:
            fits.append(row)
    frontier: list[Row] = []
    for row in sorted(fits, key=lambda row: (row.bytes_per_item, row.predicted.ms)):
        better = next((other for other in frontier if other.predicted.ms <= row.predicted.ms), None)
        if better is None:
            frontier.append(row)
        else:
            quick = f"{better.predicted.ms:.2f} ms against {row.predicted.ms:.2f} at {row.predicted.items:,} items"
            rejected.append(
                Rejected(str(row.plan), f"'{better.plan}' needs no more bytes and is as quick or quicker: {quick}")
            )
    quickest = min((row.predicted.ms for row in frontier), default=float("inf"))
    if most is not None:
        # What is quick enough need not be quicker: the fewest bytes then.
        good = [row for row in frontier if row.predicted.ms <= most][:1]
    else:
        good = [row for row in frontier if row.predicted.ms <= SLOWER * quickest][:1]
    advice = ""
    if not good:
        near = min(frontier, key=lambda row: row.predicted.ms, default=None)
        advice = (
            f"no plan is expected within {most:g} ms at {facts['items']:,} items; the quickest is '{near.planned}' "
            f"with {near.predicted.ms:.2f} ms: allow that, more memory, a lower recall or fewer items"
            if near is not None and most is not None
            else "no plan reached the recall within the memory; the reasons are in `rejected`"
        )
    return Plans(tuple(frontier), tuple(rejected), advice, good[0] if good else None, *widths, facts)
