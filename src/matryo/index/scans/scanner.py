"""A first stage that builds something: what is built covers the rows that were there, a flat tail those written since.

The tail is scanned exactly, in the same code, and its answers are merged. When it has grown past an eighth of what is
built, a thread builds the larger one beside it; searches use the old one and its tail until the new one is there. The
first graph or set of cells is built so too, unless the rows are few: until it is there every row is tail. A build ends
early, and leaves nothing, when the index is closed or the program ends.
"""

import threading
from dataclasses import replace
from typing import Any, Protocol, Self

import numpy as np

from matryo.core.codecs import Codec, Float32s
from matryo.core.errors import MatryoError
from matryo.core.plan import Plan, Stage
from matryo.index.column import Column, Stored
from matryo.index.scans.cells import Cells
from matryo.index.scans.common import Allowed, Found, Rows, Scored, first
from matryo.index.scans.flat import dense, scan_column
from matryo.index.scans.graph import Graph

TAIL_LEAST = 4096
TAIL_SHARE = 8
"""A tail of more than TAIL_LEAST rows and one TAIL_SHARE-th of what is built is merged into it."""
AT_ONCE = 1 << 14
"""Up to so many rows a first graph is built while the caller waits: a second or two."""
QUERY_OPTIONS = ("ef", "probe")
"""What may differ between searches of one graph or one set of cells."""


class Sealed(Protocol):
    """What is built over rows 0:rows. It never changes; `grown` makes another."""

    index: Any

    @property
    def rows(self) -> int:
        """Rows it covers."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    def grown(self, vectors: Stored, end: int) -> Self:
        """A copy that covers the rows up to `end` too."""

    def search(self, queries_QD: Float32s, n: int, allowed: Allowed | None, options: dict[str, int]) -> list[Found]:
        """The n best rows of each query, ascending, at most n."""

    def tail_codec(self) -> Codec | None:
        """The codec of its rows, None where one fitted anew will do."""


def sealed_name(stage: Stage) -> str:
    """What a scan of this stage builds, as text: `pq32 flat`, `int8 hnsw(M=32)`; same text, same structure."""
    kept = tuple(sorted(option for option in stage.options if option[0] not in QUERY_OPTIONS))
    text = str(replace(stage, options=kept, keep=None, within=None)).split(":", 1)[1]
    return f"{text} flat" if stage.scan == "flat" else text


def stage_of(width: int, name: str) -> Stage:
    """The stage whose `sealed_name` this is."""
    return Plan.parse(f"{width}:{name}").stages[0]


def least_rows(stage: Stage) -> int:
    """Rows from which on something is built; fewer are all tail."""
    return dict(stage.options).get("cells", 1)


class Scanner:
    """One sealed structure and its tail. Safe to use from several threads."""

    def __init__(self, stage: Stage, sealed: Sealed | None = None) -> None:
        self.stage = stage
        self._lock = threading.Lock()
        self._merging: threading.Thread | None = None
        self._begun = 0
        """Rows of the last first build that was begun; one that failed is not begun again for the same rows."""
        self._abandoned = threading.Event()
        self._latest: Stored | None = None
        """What the tail was last extended from."""
        self._pair: tuple[Sealed | None, Column] = (sealed, self._tail_of(sealed))

    @property
    def rows(self) -> int:
        """Rows covered by what is built."""
        sealed = self._pair[0]
        return 0 if sealed is None else sealed.rows

    @property
    def end(self) -> int:
        """Rows covered, with the tail."""
        return self._pair[1].end

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        sealed, tail = self._pair
        return tail.nbytes + (0 if sealed is None else sealed.nbytes)

    @property
    def sealed(self) -> Sealed | None:
        """What is built."""
        return self._pair[0]

    def scan(
        self, stage: Stage, queries_QD: Float32s, n: int, vectors: Stored, end: int, allowed: Allowed | None
    ) -> list[Scored]:
        """The n best rows among 0:end for each query, ascending; all allowed ones where there are no more than n."""
        count = end if allowed is None else allowed.count
        if n >= count or not len(queries_QD):
            every = np.arange(end) if allowed is None else allowed.rows
            return [(None, every) for _ in queries_QD]
        sealed, tail = self.cover(vectors, end)
        options = dict(stage.options)
        if sealed is None:
            return scan_column(tail, queries_QD, n, end, allowed)
        # Scores beside those of what is built, in which the float query meets the bits.
        found = dense(tail, queries_QD, n, end, allowed, hamming_of_bits=False) if end > tail.first else []
        if sealed.rows > end and allowed is None:
            allowed = Allowed(np.ones(end, dtype=bool))
        answers: list[Scored] = []
        for number, (scores, rows) in enumerate(sealed.search(queries_QD, n, allowed, options)):
            if found:
                late_scores, late_rows = found[number]
                scores, rows = np.concatenate([scores, late_scores]), np.concatenate([rows, late_rows])
                scores, rows = first(scores, rows, n)
            answers.append((scores, rows))
        return answers

    def cover(self, vectors: Stored, end: int) -> tuple[Sealed | None, Column]:
        """What is built and its tail, together covering rows 0:end."""
        sealed, tail = self._pair
        if tail.end >= end and (sealed is not None or not self._due(end)):
            return sealed, tail
        with self._lock:
            sealed, tail = self._pair
            due = sealed is None and self._due(end)
            if due and (self.stage.scan == "flat" or end <= AT_ONCE):
                # Packing a code takes as long as coding the tail would.
                sealed, due = build(self.stage, vectors, end), False
                tail = self._tail_of(sealed)
            if end > tail.end:
                tail.extend(vectors, end)
                self._latest = vectors
            if sealed is None and tail.stale:
                tail = self._tail_of(None)
                tail.extend(vectors, end)
            self._pair = (sealed, tail)
            if due or (sealed is not None and tail.rows > max(TAIL_LEAST, sealed.rows // TAIL_SHARE)):
                self._merge_aside(vectors, end)
            return self._pair

    def prepare(self, vectors: Stored, end: int) -> None:
        """Return when what is built covers rows 0:end but for a tail. Searches go on meanwhile."""
        self.cover(vectors, end)
        self.wait()
        self.cover(vectors, end)  # a build that ended just now may have been of fewer rows
        self.wait()

    def wait(self) -> None:
        """Until nothing is being built."""
        merging = self._merging
        if merging is not None and merging is not threading.current_thread():
            merging.join()

    def abandon(self) -> None:
        """Nobody will search here any more: a build under way ends soon, and none begins."""
        self._abandoned.set()

    def _due(self, end: int) -> bool:
        """Whether a first build is to begin."""
        return end >= least_rows(self.stage) and end > self._begun

    def _merge_aside(self, vectors: Stored, end: int) -> None:
        if (self._merging is None or not self._merging.is_alive()) and not self._abandoned.is_set():
            self._begun = end
            self._merging = threading.Thread(target=self._merge, args=(vectors, end), name="matryo-merge")
            self._merging.start()

    def _merge(self, vectors: Stored, end: int) -> None:
        sealed, _ = self._pair
        source = _Until(vectors, self._abandoned)
        try:
            # Centres and scales learnt from less than half of the rows are learnt anew.
            if sealed is None or end > 2 * sealed.rows:
                larger = build(self.stage, source, end)
            else:
                larger = sealed.grown(source, end)
            fresh = self._tail_of(larger)
            with self._lock:
                fresh.extend(self._latest or vectors, max(end, self.end))
                self._pair = (larger, fresh)
        except (MatryoError, _AbandonedError):
            return  # damaged vectors: the tail goes on answering, and whoever reads those rows is told

    def _tail_of(self, sealed: Sealed | None) -> Column:
        first_row = 0 if sealed is None else sealed.rows
        codec = None if sealed is None else sealed.tail_codec()
        return Column(self.stage.code, self.stage.width, first_row, codec)


class _AbandonedError(Exception):
    """The index was closed, or the program is ending, while something was being built."""


class _Until:
    """Rows to build from, until they are no longer wanted. A thread that only builds must not keep a program alive."""

    def __init__(self, vectors: Stored, abandoned: threading.Event) -> None:
        self._vectors, self._abandoned = vectors, abandoned

    def take(self, rows: Rows) -> Float32s:
        """(R, D) unit rows."""
        self._look()
        return self._vectors.take(rows)

    def chunk(self, start: int, stop: int) -> Float32s:
        """Unit rows start:stop."""
        self._look()
        return self._vectors.chunk(start, stop)

    def _look(self) -> None:
        if self._abandoned.is_set() or not threading.main_thread().is_alive():
            raise _AbandonedError


def build(stage: Stage, vectors: Stored, end: int) -> Sealed:
    """What the stage's scan needs, over rows 0:end."""
    return (Graph if stage.scan == "hnsw" else Cells).build(stage, vectors, end)
