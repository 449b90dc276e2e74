"""What every engine's index shares: checks before anything is sent, calibration, retries. An engine adds its words.

Letters in array names: N items, Q queries, D full width, k answers.
"""

import json
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from matryo.core.errors import FormatError, InputError, UnavailableError
from matryo.core.plan import Plan, Stage
from matryo.core.prefix import check_width
from matryo.core.promise import Floats, Promise, check_target, lower_bound, smallest
from matryo.engines.address import Address
from matryo.index.calibration import ITEMS_ASKED, SEED, ladder_of, note
from matryo.index.funnel import Float32s, StageReport
from matryo.index.hits import Hits
from matryo.index.index import Index
from matryo.index.items import Batch, Metadata, check_documents, check_ids, check_metadata, read_ids
from matryo.index.opening import check_k, check_model, check_store, insist_on_model, unit_queries
from matryo.index.vectors import check_rows, unit_chunks
from matryo.index.where import Condition, parse_where

T = TypeVar("T")
FORMAT = 1
"""Of what we note in an engine about an index, and of the layout of its tables and collections."""
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 6, 0.1, 3.0
"""Of a call that fails for a moment: tried so often, with waits that double, in seconds."""
TOLERANCE = 1e-6
"""Between scores of one item by two plans: engines sum in orders of their own."""


@dataclass(frozen=True)
class Can:
    """What an engine can do, as data: a contract test walks it, and a plan beyond it is refused with these words."""

    engine: str
    """As an error names it."""
    scans: Mapping[str, tuple[str, ...]]
    """Scan of a first stage -> the codes it runs over; "flat" is exact."""
    rescores: tuple[str, ...]
    """Codes that later stages may score by."""
    widest: int
    """Dimensions a stored vector may have."""
    stages: int = 8
    """Stages a plan may have."""
    within: bool = False
    """Whether a first stage may stop by itself, query by query."""
    kept: tuple[str, ...] = ("float16", "float32")
    """How full vectors may be stored, the default first."""
    commits: bool = True
    """Whether a batch is one commit; otherwise an error may leave a part of it, and repeating it completes it."""
    ordered: bool = True
    """Whether equal scores come in the order they were written; otherwise they come by id."""
    ties: bool = True
    """Whether a shortlist that is cut between equal scores holds those that come first in that order."""
    any_plan: bool = True
    """Whether a search may go by a plan that was not prepared."""


@dataclass(frozen=True)
class Note:
    """What an engine keeps about an index, as JSON beside its items."""

    width: int
    plan: str
    store: str
    model: dict[str, Any] | None = None
    promise: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    """Fingerprint and rows read of the stream it is filled from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """An engine's own facts."""
    format: int = FORMAT

    def as_text(self) -> str:
        """JSON that `read` takes back."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def read(cls, text: str, place: object) -> "Note":
        """A note from its text.

        Raises:
            FormatError: written by another format, or not a note of ours.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise FormatError(
                    f"{place} is of format {content['format']!r}; this release reads format {FORMAT}. Use the release "
                    "that wrote it, or build a new index"
                )
            return cls(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(f"{place} was not made by Matryo, or was changed by hand ({error})") from error


@dataclass(frozen=True)
class Asked:
    """A search, checked. `width` is set for an answer by the exact cosines of a prefix alone."""

    units: Float32s
    """(Q, D) unit rows."""
    k: int
    plan: Plan
    where: Condition | None
    width: int | None
    explain: bool


@dataclass(frozen=True)
class Found:
    """The answers of one query, best first: ids, scores, documents, and metadata as JSON text."""

    ids: list[str]
    scores: list[float]
    documents: list[str | None]
    metadata: list[str | None]


class EngineIndex(Index):
    """An index in an engine. Subclasses say how items are written, removed, found and counted there."""

    can: ClassVar[Can]

    def __init__(self, address: Address, note: Note, read_only: bool) -> None:
        """Not for callers: use `create` or `open`."""
        self.address, self._note, self._read_only = address, note, read_only
        self._closed = False

    # What an engine says in its own words. Inputs are checked; transient errors may be raised as `TransientError`.

    @classmethod
    @abstractmethod
    def default_plan(cls, width: int) -> Plan:
        """A safe plan for vectors of so many dimensions."""

    @classmethod
    @abstractmethod
    def _create(cls, path: str | Path, note: Note) -> Self:
        """Make it, whole or not at all; an InputError if it is there already."""

    @classmethod
    @abstractmethod
    def _open(cls, path: str | Path, read_only: bool) -> Self:
        """Open what is there; an InputError if nothing is."""

    @abstractmethod
    def _write(
        self,
        keys: list[str],
        units_ND: Float32s,
        documents: list[str | None],
        metadata: list[str | None],
        source: dict[str, Any] | None,
    ) -> None:
        """Upsert a batch; safe to repeat. `source` is to be noted in the same commit, where given."""

    @abstractmethod
    def _remove(self, keys: list[str]) -> int:
        """Delete; how many were there."""

    @abstractmethod
    def _find(self, asked: Asked) -> tuple[list[Found], list[StageReport] | None]:
        """Answer a search."""

    @abstractmethod
    def _count(self) -> int:
        """Items now."""

    @abstractmethod
    def _sample(self, n: int, seed: int) -> tuple[list[str], Float32s]:
        """About n items drawn at random, ids and (n, D) rows."""

    @abstractmethod
    def _occupied(self) -> dict[str, Any]:
        """What `stats` says besides: bytes, columns, whatever the engine can tell."""

    @abstractmethod
    def _read_note(self) -> Note:
        """The note as it is there now."""

    @abstractmethod
    def _write_note(self, note: Note) -> None:
        """Replace the note as one commit."""

    # What is the same everywhere.

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        width: int,
        plan: str | Plan | None = None,
        model: dict[str, Any] | None = None,
        store: str | None = None,
    ) -> Self:
        width = check_width(width, cls.can.widest)
        chosen = cls.check_plan(cls.default_plan(width) if plan is None else plan, width)
        kept = cls.can.kept[0] if store is None else check_store(store)
        if kept not in cls.can.kept:
            raise InputError(f"{cls.can.engine} keeps full vectors as {' or '.join(cls.can.kept)}, not {kept}")
        return cls._create(path, Note(width, str(chosen), kept, check_model(model)))

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False, model: dict[str, Any] | None = None) -> Self:
        found = cls._open(path, read_only)
        try:
            insist_on_model(found._note.model, model, found.address)
        except BaseException:
            found.close()
            raise
        return found

    @classmethod
    def check_plan(cls, plan: str | Plan, width: int) -> Plan:
        """The plan, if this engine can run it on vectors of `width` dimensions.

        Raises:
            InputError: it cannot; says what it can.
        """
        chosen = Plan.parse(plan) if isinstance(plan, str) else plan
        chosen.check(width)
        can = cls.can
        for n, stage in enumerate(chosen.stages, start=1):
            if n == 1 and stage.scan not in can.scans:
                raise InputError(f"stage 1 ({stage}): {can.engine} scans by {', '.join(can.scans)}")
            codes = can.scans[stage.scan] if n == 1 else can.rescores
            if stage.code not in codes:
                what = f"{stage.scan} of {can.engine} runs over" if n == 1 else f"later stages of {can.engine} score by"
                raise InputError(f"stage {n} ({stage}): {what} {', '.join(codes)}")
            if stage.within is not None and not can.within:
                raise InputError(f"stage {n} ({stage}): {can.engine} does not stop query by query; leave `within` out")
        if len(chosen.stages) > can.stages:
            raise InputError(f"{can.engine} runs plans of at most {can.stages} stages, got {len(chosen.stages)}")
        return chosen

    def upsert(
        self,
        ids: Sequence[str],
        vectors: Any,
        documents: Sequence[str | None] | None = None,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> int:
        return self._upsert(Batch(ids, vectors, documents, metadata), None)

    def extend(self, batches: Iterable[Batch], source: str | None = None) -> int:
        written, read = 0, 0 if source is None else self.read_from(source)
        for batch in batches:
            read += len(batch.ids) if batch.read is None else batch.read
            written += self._upsert(batch, None if source is None else {"fingerprint": source, "read": read})
        return written

    def read_from(self, source: str) -> int:
        noted = self._latest()
        if noted.source is None and not len(self):
            return 0
        if noted.source is None or noted.source["fingerprint"] != source:
            raise InputError(
                f"{self.address} was begun from another source; go on with that one, or build a new index from this one"
            )
        return int(noted.source["read"])

    def delete(self, ids: Sequence[str]) -> int:
        self._refuse_reading()
        keys = list(dict.fromkeys(read_ids(ids)))
        return self._trying(lambda: self._remove(keys)) if keys else 0

    def search(
        self,
        queries: Any,
        k: int = 10,
        plan: str | Plan | None = None,
        where: dict[str, Any] | None = None,
        explain: bool = False,
        width: int | None = None,
    ) -> Hits:
        self._refuse_closed()
        k = check_k(k)
        if width is not None and plan is not None:
            raise InputError("width is a search without a plan; give one of the two")
        condition = None if where is None else parse_where(where)
        noted = self._note if plan is not None and not explain else self._latest()
        full = noted.width
        if width is None:
            chosen = self.check_plan(noted.plan if plan is None else plan, full)
        else:
            chosen = Plan((Stage(check_width(width, full), "float32"),))
        units = unit_queries(queries, full)
        asked = Asked(units, k, chosen, condition, width, explain)
        found, reports = self._trying(lambda: self._find(asked)) if len(units) else ([], [])
        promise = None
        if explain:
            made = None if noted.promise is None else Promise.from_json(noted.promise)
            promise = note(made, chosen, k, len(self), condition is not None)
        return Hits(
            [one.ids for one in found],
            [one.scores for one in found],
            [one.documents for one in found],
            [[None if text is None else json.loads(text) for text in one.metadata] for one in found],
            reports if explain else None,
            promise,
        )

    def recalls(self, queries: Any, k: int = 10) -> Callable[[str | Plan], Floats]:
        return self._recalls(unit_queries(queries, self._note.width), check_k(k), None)

    def _recalls(self, units_QD: Float32s, k: int, own: list[str] | None) -> Callable[[str | Plan], Floats]:
        """As `recalls`; with `own`, query q is the item own[q], which counts neither as found nor as to be found."""
        asked = k if own is None else k + 1
        full = self._note.width

        def scores(plan: str | Plan) -> list[list[float]]:
            hits = self.search(units_QD, asked, plan=plan)
            rows = zip(hits.ids, hits.scores, own or [""] * len(units_QD), strict=True)
            return [[s for i, s in zip(ids, values, strict=True) if i != mine][:k] for ids, values, mine in rows]

        best = scores(f"{full}:float32")
        edges = [row[-1] - TOLERANCE if row else np.inf for row in best]
        most = min(k, *(len(row) for row in best)) if best else k

        def found(plan: str | Plan) -> Floats:
            hits = [sum(s >= edge for s in row) for row, edge in zip(scores(plan), edges, strict=True)]
            return np.asarray(hits, dtype=np.float64) / most

        return found

    def calibrate(
        self,
        queries: Any = None,
        recall: float = 0.95,
        confidence: float = 0.95,
        k: int = 10,
        plan: str | Plan | None = None,
    ) -> Promise:
        self._refuse_reading()
        k, noted, items = check_k(k), self._latest(), len(self)
        chosen = self.check_plan(noted.plan if plan is None else plan, noted.width)
        if items <= k + (queries is None):
            raise InputError(
                f"the index holds {items} items and k is {k}: every search finds them all, so there is nothing to "
                "calibrate; add items or ask for fewer answers"
            )
        own: list[str] | None = None
        if queries is None:
            own, units = self._trying(lambda: self._sample(ITEMS_ASKED, SEED))
        else:
            units = unit_queries(queries, noted.width)
        target, sure = check_target(recall, confidence, len(units))
        self.prepare(chosen)
        ladder = ladder_of(chosen, k, items, noted.width)
        best, measured = smallest(ladder, self._recalls(units, k, own), target, sure)
        promise = Promise(
            best, target, sure, len(units), k, items, float(measured.mean()), lower_bound(measured, sure),
            "queries" if own is None else "items", float(sum(stage.keep or 0 for stage in best.stages)),
        )  # fmt: skip
        self._change(lambda latest: replace(latest, plan=str(best), promise=promise.as_json()))
        return promise

    def stats(self) -> dict[str, Any]:
        noted = self._latest()
        return {
            "items": len(self),
            "width": noted.width,
            "plan": noted.plan,
            "promise": noted.promise,
            "model": noted.model,
            "format": noted.format,
            "store": noted.store,
            "bytes_per_item": {},
            **self._trying(self._occupied),
        }

    def close(self) -> None:
        self._closed = True

    def __len__(self) -> int:
        self._refuse_closed()
        return self._trying(self._count)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.address)!r}, width={self._note.width}, plan={self._note.plan!r})"

    def _made(self, make: Callable[[], None]) -> Self:
        """This index, once `make` has made it there; closed again where it fails."""
        try:
            self._trying(make)
        except BaseException:
            self.close()
            raise
        return self

    def _upsert(self, batch: Batch, source: dict[str, Any] | None) -> int:
        self._refuse_reading()
        keys, vectors = check_ids(batch.ids), batch.vectors
        rows = check_rows(vectors, self._note.width, "vectors") if keys or len(vectors) else vectors
        if len(rows) != len(keys):
            raise InputError(f"{len(keys)} ids but {len(rows)} vectors; give one vector per id")
        texts, fields = check_documents(batch.documents, len(keys)), check_metadata(batch.metadata, len(keys))
        if not keys and source is None:
            return 0
        empty = np.empty((0, self._note.width), dtype=np.float32)
        units = np.concatenate(list(unit_chunks(rows))) if keys else empty
        self._trying(lambda: self._write(keys, units, texts, fields, source))
        return len(keys)

    def _latest(self) -> Note:
        """The note as it is now, remembered."""
        self._refuse_closed()
        self._note = self._trying(self._read_note)
        return self._note

    def _change(self, how: Callable[[Note], Note]) -> None:
        changed = how(self._latest())
        self._trying(lambda: self._write_note(changed))
        self._note = changed

    def _trying(self, call: Callable[[], T]) -> T:
        """Call again, after waits that double, while the engine fails for a moment only."""
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except TransientError as error:
                if attempt == ATTEMPTS:
                    raise UnavailableError(
                        f"{self.address} did not answer in {ATTEMPTS} attempts ({self.address.clean(error)}); see that "
                        "the server runs and can be reached, then call again: what was acknowledged is there"
                    ) from error
                time.sleep(wait * random.uniform(0.5, 1))
                wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InputError(f"this index is closed; open it again with Index.open({str(self.address)!r})")

    def _refuse_reading(self) -> None:
        self._refuse_closed()
        if self._read_only:
            raise InputError("this index was opened read_only; open it without to write")


class TransientError(Exception):
    """A failure that may be over in a moment: a lost connection, a restart, a conflict of two writers.

    It becomes an UnavailableError if it lasts.
    """
