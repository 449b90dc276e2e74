"""Qdrant as an index, whichever way it is reached: the verbs, over the few calls that all ways share.

One collection per index, with named vectors (see `qdrant_requests`), and in it one point without vectors that holds
the note. Codes and graphs are Qdrant's own: `prepare` adds the prefixes that a plan reads, fills them and waits for
both; until then Qdrant scans the floats of what it has not coded yet.
"""

import json
import time
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self
from uuid import UUID

import numpy as np

from matryo.core.errors import FormatError, InputError
from matryo.core.plan import Plan, Stage
from matryo.engines import qdrant_requests as words
from matryo.engines.base import Asked, Can, EngineIndex, Found, Note
from matryo.engines.qdrant_requests import CODES, FULL, NOTE, Json, Vectors
from matryo.index.funnel import Float32s, StageReport
from matryo.index.report import CheckReport

PREFIXES = "prefixes"
"""Where the note names the prefixes."""
TIED = 1024
"""Equal scores that are put into the order of writing, at most, where the last answer is one of them."""
PAGE = 500
"""Points read at a time."""
FIELDS = 64
"""Metadata fields that get an index of their own, those that come first."""
SCAN = 256
"""Width of the first stage of the plan by default."""
LENGTH = 1e-3
"""How far from one a full vector's length may be before `check` calls it damaged."""


@dataclass(frozen=True)
class Answer:
    """A point as it comes back."""

    id: str
    score: float
    payload: Json
    vectors: dict[str, list[float]] = field(default_factory=dict)


class QdrantIndex(EngineIndex):
    """An index in Qdrant. Subclasses say how to reach it."""

    can: ClassVar[Can] = Can(
        "Qdrant", {"flat": CODES, "hnsw": CODES}, CODES, widest=65_536, kept=("float32",), ties=False, any_plan=False
    )

    _row = 0
    _fields: set[str] | None = None

    # How it is reached. Requests and points are JSON as `qdrant_requests` makes it; ids are texts.

    @abstractmethod
    def _query(self, requests: list[Json]) -> list[list[Answer]]:
        """Answer searches."""

    @abstractmethod
    def _put(self, points: list[Json], note: Json | None) -> None:
        """Upsert points, and the note with them or after them."""

    @abstractmethod
    def _get(self, ids: list[str]) -> list[Answer]:
        """The points of these ids that are there."""

    @abstractmethod
    def _page(self, where: Json, offset: str | None, limit: int, vectors: list[str]) -> list[Answer]:
        """Points in the order of their ids, from `offset` on, with these vectors."""

    @abstractmethod
    def _matching(self, where: Json | None) -> int:
        """How many points match, exactly."""

    @abstractmethod
    def _drop(self, ids: list[str]) -> None:
        """Delete points."""

    @abstractmethod
    def _fill(self, ids: list[str], vectors: dict[str, Float32s]) -> None:
        """Set some named vectors of points that are there."""

    @abstractmethod
    def _add(self, vectors: Vectors, names: list[str]) -> None:
        """Add those of `vectors` that have these names; harmless where they are there."""

    @abstractmethod
    def _index_fields(self, kinds: dict[str, str]) -> None:
        """Index payload fields: path -> keyword or float."""

    @abstractmethod
    def _indexed_fields(self) -> set[str]:
        """Paths that have an index."""

    @abstractmethod
    def _settle(self) -> None:
        """Return when codes and graphs of what is written are there."""

    @abstractmethod
    def _sizes(self) -> dict[str, int]:
        """Name -> dimensions of the collection's vectors."""

    # The verbs.

    @classmethod
    def default_plan(cls, width: int) -> Plan:
        if width <= SCAN:
            return Plan((Stage(width, "float32"),))
        graph = Stage(SCAN, "int8", "hnsw", (("M", words.LINKS), ("ef", 200)), keep=200)
        return Plan((graph, Stage(width, "float32")))

    def _vectors(self, noted: Note) -> Vectors:
        return words.read_vectors(noted.extra.get(PREFIXES, ()), noted.width)

    @classmethod
    def _noted(cls, note: Note) -> Note:
        """The note of a new index, which names the prefixes of its plan."""
        there = {FULL: words.Prefix(note.width)}
        return replace(note, extra={PREFIXES: words.lacking(Plan.parse(note.plan), there)})

    def _opened(self) -> Self:
        """The note read, and compared with the collection."""
        noted, sizes = self._latest(), self._trying(self._sizes)
        for name, prefix in self._vectors(noted).items():
            if sizes.get(name) != prefix.width:
                found = f"{sizes[name]} dimensions" if name in sizes else "nothing"
                raise FormatError(
                    f"{self.address} is noted to hold {prefix.width} dimensions as {name!r}, but holds {found}: the "
                    "collection was changed by hand; build the index again"
                )
        return self

    def _read_note(self) -> Note:
        for point in self._get([NOTE]):
            if "matryo" in point.payload:
                return Note.read(str(point.payload["matryo"]), self.address)
        raise FormatError(
            f"{self.address} was not made by Matryo, or its making was cut off; choose another name, or delete it"
        )

    def _write_note(self, note: Note) -> None:
        self._put([], words.note_point(note.as_text()))

    def _write(
        self,
        keys: list[str],
        units_ND: Float32s,
        documents: list[str | None],
        metadata: list[str | None],
        source: Json | None,
    ) -> None:
        noted = self._read_note()
        first = self._row = max(time.time_ns(), self._row)
        self._row += len(keys)
        points = words.points(keys, units_ND, documents, metadata, self._vectors(noted), first)
        self._index_new_fields(points)
        last = None if source is None else words.note_point(replace(noted, source=source).as_text())
        self._put(points, last)

    def _index_new_fields(self, points: list[Json]) -> None:
        kinds = words.kinds_of(points)
        if self._fields is None and kinds:
            self._fields = self._indexed_fields()
        known = self._fields or set()
        # Qdrant writes a path without the quotes that it does not need.
        new = {path: kind for path, kind in kinds.items() if path not in known and path.replace('"', "") not in known}
        wanted = dict(list(new.items())[: max(0, FIELDS - len(known))])
        if wanted:
            self._index_fields(wanted)
            known |= set(wanted)

    def _remove(self, keys: list[str]) -> int:
        ids = [words.point_id(key) for key in keys]
        there = self._matching({"must": [{"has_id": ids}]})
        if there:
            self._drop(ids)
        return there

    def _find(self, asked: Asked) -> tuple[list[Found], list[StageReport] | None]:
        started = time.perf_counter()
        vectors = self._reading(asked.plan)
        wanted = list(range(len(asked.units)))
        answers: list[list[Answer]] = [[]] * len(wanted)
        limit = asked.k + 1
        while wanted:
            for n, points in zip(wanted, self._query(self._requests(asked, wanted, limit, vectors)), strict=True):
                answers[n] = points
            # One answer more than asked for tells whether the last of them has equals beyond it.
            wanted = [n for n in wanted if _cut_among_equals(answers[n], asked.k, limit)]
            if limit > asked.k + TIED:
                break
            limit *= 2
        try:
            found = [_found(sorted(points, key=_by_score_then_row)[: asked.k]) for points in answers]
        except KeyError as error:
            raise FormatError(
                f"{self.address} holds points that Matryo did not write; index.check() names them"
            ) from error
        took = 1e3 * (time.perf_counter() - started)
        return found, self._reports(asked, found, took) if asked.explain else None

    def _requests(self, asked: Asked, wanted: list[int], limit: int, vectors: Vectors) -> list[Json]:
        units = [asked.units[n] for n in wanted]
        if asked.width is None:
            return [words.funnel(asked.plan, row, asked.k, limit, asked.where, vectors) for row in units]
        name = words.serving(asked.plan.stages[0], vectors)
        assert name is not None
        return [words.by_prefix(name, row, asked.width, limit, asked.where) for row in units]

    def _reading(self, plan: Plan) -> Vectors:
        """The collection's vectors, if they serve every stage of a plan."""
        vectors = self._vectors(self._note)
        if words.lacking(plan, vectors):
            self._note = self._read_note()  # another process may have prepared it
            vectors = self._vectors(self._note)
        missing = words.lacking(plan, vectors)
        if missing:
            raise InputError(
                f"{self.address} has no {' and no '.join(missing)}, which the plan '{plan}' reads; it has "
                f"{', '.join(vectors)}. Qdrant stores every prefix it searches: add them once with "
                f"index.prepare('{plan}')"
            )
        return vectors

    def _reports(self, asked: Asked, found: list[Found], milliseconds: float) -> list[StageReport]:
        """What each stage was told to keep; the request is one, and its time is given with the last stage."""
        matching = len(self) if asked.where is None else self._matching(words.condition_of(asked.where))
        considered, reports = matching * len(found), []
        for n, stage in enumerate(asked.plan.stages, start=1):
            last = n == len(asked.plan.stages)
            limit = min(max(asked.k, stage.keep or asked.k), matching)
            each = [len(one.ids) for one in found] if last else [limit] * len(found)
            reports.append(StageReport(str(stage), considered, sum(each), milliseconds if last else 0.0, each))
            considered = sum(each)
        return reports

    def prepare(self, plan: str | Plan | None = None) -> None:
        """Add the prefixes that a plan reads, fill them for every item, and wait for codes and graphs."""
        noted = self._latest()
        chosen = self.check_plan(noted.plan if plan is None else plan, noted.width)
        vectors = self._vectors(noted)
        missing = words.lacking(chosen, vectors)
        if missing:
            self._refuse_reading()
            names = [*noted.extra.get(PREFIXES, ()), *missing]
            vectors = words.read_vectors(names, noted.width)
            self._trying(lambda: self._add(vectors, missing))
            # Noted before they are filled: what is written from now on has them already.
            self._change(lambda latest: replace(latest, extra={**latest.extra, PREFIXES: names}))
        if not self._read_only:
            derived = {name: prefix for name, prefix in vectors.items() if name != FULL}
            while derived and self._complete(derived):
                pass
            self._trying(self._settle)

    def _complete(self, derived: Vectors) -> int:
        """Give these vectors to some of the items that lack one; how many. Cut off, it goes on where it was."""
        page = self._trying(lambda: self._page(words.lack(derived), None, PAGE, [FULL]))
        if page:
            cut = words.prefixes(np.array([point.vectors[FULL] for point in page], np.float32), derived)
            self._trying(lambda: self._fill([point.id for point in page], cut))
        return len(page)

    def _count(self) -> int:
        return self._matching(None) - 1

    def _sample(self, n: int, seed: int) -> tuple[list[str], Float32s]:
        """In the order of their ids, which are digests, from a place that the seed draws."""
        start = str(UUID(int=int(np.random.default_rng(seed).integers(1 << 62)) << 66))
        found = list(self._walk(start, n))
        if len(found) < n:
            seen = {point.id for point in found}
            found += [point for point in self._walk(None, n - len(found)) if point.id not in seen]
        return [point.payload["id"] for point in found], np.array([p.vectors[FULL] for p in found], np.float32)

    def _walk(self, start: str | None, most: int | None = None) -> Iterable[Answer]:
        """Items in the order of their ids, with their full vectors."""
        given = 0
        while most is None or given < most:
            page = self._page({"must_not": [{"has_id": [NOTE]}]}, start, PAGE + 1, [FULL])
            for point in page[: PAGE if most is None else min(PAGE, most - given)]:
                given += 1
                yield point
            if len(page) <= PAGE:
                return
            start = page[PAGE].id

    def stats(self) -> Json:
        return {**super().stats(), "vectors": list(self._vectors(self._note))}

    def check(self) -> CheckReport:
        """Read every item: its id, its fields, the length of its vector, and that it has every prefix."""
        vectors, problems = self._vectors(self._latest()), []
        try:
            for point in self._walk(None):
                key = point.payload.get("id")
                if not isinstance(key, str) or words.point_id(key) != point.id:
                    problems.append(f"point {point.id}: its payload has another item's id ({key!r})")
                elif abs(np.linalg.norm(np.array(point.vectors.get(FULL, ()), np.float64)) - 1) > LENGTH:
                    problems.append(f"{key!r}: its full vector is not of length 1")
            without = self._trying(lambda: self._matching(words.lack(vectors)))
            if without:
                names = ", ".join(vectors)
                problems.append(f"{without} items lack one of {names}; index.prepare() adds what can be derived")
        except (OSError, FormatError) as error:
            problems.append(str(error))
        return CheckReport((str(self.address),), tuple(problems), ())

    def compact(self, store: str | None = None) -> int:
        """Let Qdrant merge what it has and derive codes and graphs anew; 0, as it does not say what it dropped."""
        self._refuse_reading()
        if store not in (None, self._note.store):
            raise InputError(f"{self.address} keeps its vectors as {self._note.store}; Qdrant scores no other exactly")
        self._trying(self._settle)
        return 0


def _by_score_then_row(point: Answer) -> tuple[float, int]:
    return -point.score, int(point.payload.get("row", 0))


def _cut_among_equals(found: list[Answer], k: int, limit: int) -> bool:
    """Whether the k-th answer has equals and all that came back after it are such."""
    return len(found) == limit and found[k - 1].score == found[-1].score


def _found(points: list[Answer]) -> Found:
    payloads = [point.payload for point in points]
    fields = [payload.get("metadata") for payload in payloads]
    return Found(
        [payload["id"] for payload in payloads],
        [point.score for point in points],
        [payload.get("document") for payload in payloads],
        [None if one is None else json.dumps(one, ensure_ascii=False) for one in fields],
    )
