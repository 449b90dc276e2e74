"""One committed moment of an index, and the funnel's view of it. Immutable, so any number of threads may search it."""

import sqlite3
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matryo.core.plan import Plan, Stage
from matryo.core.prefix import truncate
from matryo.index import catalogue as cat
from matryo.index.codes import CodeStore, by_bounds, held_as
from matryo.index.column import products
from matryo.index.funnel import Rows, best
from matryo.index.rerank import inner_products
from matryo.index.scans.bounds import NAME as BOUNDS
from matryo.index.scans.common import Allowed, Scored
from matryo.index.vectors import STORES, Float32s, Vectors, floats

VERIFY_AT_OPEN = 64 << 20
"""Files up to this many bytes are verified whole when opened; larger ones block by block on first use."""
COSTS_AT_A_TIME = 1 << 24
FLOATS_AT_A_TIME = 1 << 18
SLACK = 1e-5
"""Float32 sums of unit rows taken in another order differ by less than this."""
FILTERS_KEPT = 8


def vectors_path(folder: Path, generation: int, store: str) -> Path:
    """The vectors file of a generation."""
    return folder / f"vectors-{generation}.{STORES[store][1]}"


class Filters:
    """The rows that matched recent filters, for as long as nothing is written. Safe to use from several threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Allowed] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, key: str) -> Allowed | None:
        """What this filter left, if it was asked lately."""
        return self._known.get(key)

    def keep(self, key: str, allowed: Allowed) -> None:
        """Remember what this filter left, and forget the oldest."""
        with self._lock:
            self._known[key] = allowed
            while len(self._known) > FILTERS_KEPT:
                self._known.popitem(last=False)


@dataclass
class Snapshot:
    """State, vectors, live rows and codes as of one commit."""

    state: cat.State
    vectors: Vectors
    live: NDArray[np.bool_]
    codes: CodeStore
    filters: Filters = field(default_factory=Filters)

    @property
    def all_live(self) -> bool:
        """Whether no row is dead."""
        return self.state.live == self.state.end

    @cached_property
    def allowed(self) -> Allowed | None:
        """The live rows; None where no row is dead."""
        return None if self.all_live else Allowed(self.live)


def load_snapshot(
    folder: Path, connection: sqlite3.Connection, state: cat.State, older: Snapshot | None = None
) -> Snapshot:
    """Read a snapshot inside the caller's read transaction, from an older one where that saves work.

    Raises:
        FileNotFoundError: the generation was compacted away after the transaction began; begin another.
    """
    same = older if older is not None and older.state.generation == state.generation else None
    if same is not None and older is not None and older.state.seq > state.seq:
        same = None
    path = vectors_path(folder, state.generation, state.store)
    live = np.ones(state.end, dtype=bool)
    if same is None:
        dead, total = cat.read_deaths(connection)
    else:
        live[: same.state.end] = same.live
        dead, total = cat.read_deaths(connection, same.state.seq)
        total = (total + same.state.dead_sum) % (1 << 64)
    if total != state.dead_sum or (len(dead) and not 0 <= int(dead.min()) <= int(dead.max()) < state.end):
        raise sqlite3.DatabaseError("the list of dead rows is not what was written")
    live[dead] = False
    if int(live.sum()) != state.live:
        raise sqlite3.DatabaseError("the number of live rows is not what was written")
    if same is not None and same.state.end == state.end:
        return Snapshot(state, same.vectors, live, same.codes)
    vectors = Vectors(path, state.store, state.width, state.end, cat.read_blocks(connection))
    if same is not None:
        return Snapshot(state, vectors.trust(same.vectors), live, same.codes)
    manifest = {
        name: (size, digest, rows)
        for name, size, digest, rows in connection.execute("SELECT name, size, digest, rows FROM codes")
    }
    return Snapshot(state, vectors, live, CodeStore(folder / "codes", state.generation, manifest))


class View:
    """A snapshot as the funnel's source, with or without a filter on the rows."""

    def __init__(self, snapshot: Snapshot, allowed: Allowed | None = None) -> None:
        self._snapshot = snapshot
        self._allowed = snapshot.allowed if allowed is None else allowed

    @property
    def width(self) -> int:
        """Full width D."""
        return self._snapshot.state.width

    @property
    def count(self) -> int:
        """Rows that may come back."""
        return self._snapshot.state.end if self._allowed is None else self._allowed.count

    @property
    def end(self) -> int:
        """Rows of the vectors file, dead ones included."""
        return self._snapshot.state.end

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """(end,) which rows may come back; None where all may."""
        return None if self._allowed is None else self._allowed.mask

    def prefixes(self, start: int, stop: int, width: int) -> Float32s:
        """(stop - start, width) the first numbers of rows as they are stored, not scaled back to length 1."""
        vectors = self._snapshot.vectors
        vectors.ensure_all()
        return floats(vectors.stored[start:stop, :width])

    def scan(self, stage: Stage, queries_QD: Float32s, n: int) -> list[Scored]:
        """The n best rows for each query by this stage's code; exact ones come without scores."""
        end = self._snapshot.state.end
        if not end:
            return [(None, np.empty(0, np.int64)) for _ in queries_QD]
        if stage.width < self.width or stage.code != "float32" or stage.scan != "flat":
            return self._snapshot.codes.scan(stage, queries_QD, n, self._snapshot.vectors, self._allowed)
        codes, vectors = self._snapshot.codes, self._snapshot.vectors
        pruned = [codes.exact_rows(q, n, vectors, self._allowed, partial(self.exact, q)) for q in queries_QD]
        scored = iter(self._all_scored(queries_QD[[rows is None for rows in pruned]], n))
        return [(None, next(scored) if rows is None else rows) for rows in pruned]

    def _all_scored(self, queries_QD: Float32s, n: int) -> list[Rows]:
        """The n best rows by full-width scores of every row, and those that rounding cannot tell from the n-th."""
        at_a_time = max(1, COSTS_AT_A_TIME // self._snapshot.state.end)
        found: list[Rows] = []
        for start in range(0, len(queries_QD), at_a_time):
            costs = self._exact_costs(queries_QD[start : start + at_a_time])
            if self._allowed is not None:
                np.copyto(costs, np.inf, where=~self._allowed.mask)
            found += [best(row, n, SLACK) for row in costs]
        return found

    def rescore(self, stage: Stage, query_D: Float32s, rows_R: Rows) -> Float32s:
        """Scores of these rows by this stage's code."""
        vectors = self._snapshot.vectors
        if as_stored(stage, vectors.store):
            if stage.width == self.width:
                return inner_products(vectors, query_D, rows_R)
            vectors.ensure(rows_R)
            prefixes = truncate(floats(vectors.stored[rows_R, : stage.width]), stage.width)
            return row_products(prefixes, query_D[: stage.width])
        return self._snapshot.codes.column(stage.width, stage.code, vectors).scores(query_D, rows_R)

    def exact(self, query_D: Float32s, rows_R: Rows) -> Float32s:
        """Full-width cosines of these rows as they are stored."""
        return inner_products(self._snapshot.vectors, query_D, rows_R)

    def _exact_costs(self, queries_QD: Float32s) -> Float32s:
        end, vectors = self._snapshot.state.end, self._snapshot.vectors
        vectors.ensure_all()
        out = np.empty((len(queries_QD), end), np.float32)
        step = max(1, FLOATS_AT_A_TIME // self.width) if vectors.store == "float16" else end
        for start in range(0, end, step):
            stop = min(start + step, end)
            products(-queries_QD, floats(vectors.stored[start:stop]), out[:, start:stop])
        return out


def as_stored(stage: Stage, store: str) -> bool:
    """Whether a stage's shortlist is scored from the vectors file, which holds these prefixes already, up to length.

    No codes are kept in memory for such a stage.
    """
    return stage.code in ("float32", store)


def derived(plan: Plan, state: cat.State) -> list[tuple[int, str]]:
    """What a plan needs besides the vectors file, as (width, name) of `CodeStore`."""
    needed = []
    for number, stage in enumerate(plan.stages):
        scanned = number == 0 and (stage.code != "float32" or stage.width < state.width)
        if scanned or not as_stored(stage, state.store):
            needed.append((stage.width, held_as(stage, first=number == 0)))
        elif number == 0 and by_bounds(state.width, state.end):
            needed.append((state.width, BOUNDS))
    return needed


def row_products(rows_RD: Float32s, query_D: Float32s) -> Float32s:
    """(R,) inner products. einsum sums every row the same way whatever stands around it, which a matrix product does
    not promise; equal vectors therefore tie exactly and the lower row wins.
    """
    scores: Float32s = np.einsum("nd,d->n", rows_RD, query_D)
    return scores
