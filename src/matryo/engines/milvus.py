"""Milvus as an index: `milvus://host:19530/docs`, standalone or distributed, and `milvus+lite:///folder/file.db/docs`.

One collection of the items with their full vectors. What a plan's first stage scans is a column of its own, a prefix
with its index: a second vector field of that collection where the server has such (2.4 and later), or a collection
beside it (older servers, and plans prepared later). The items' collection alone says what is there: what lies beside is
written before it and deleted after it, and every answer is checked against it and scored from its full vectors.

Milvus has no transactions. A batch cut off may be there in part; writing it again makes it whole and doubles nothing.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from matryo.core.errors import FormatError, InputError, NoIndexError
from matryo.core.plan import Plan, Stage
from matryo.engines import milvus_words as words
from matryo.engines.base import TOLERANCE, Asked, Can, EngineIndex, Found, Note
from matryo.engines.milvus_client import (
    OPTIONS,
    Connection,
    Embedded,
    MilvusAddress,
    read_milvus,
    server_of,
)
from matryo.engines.milvus_words import Column
from matryo.index.funnel import Float32s, StageReport
from matryo.index.report import CheckReport

LONG = 600.0
"""Seconds for a call that loads, flushes or builds."""
NOTE, SOURCE, OWNER = "matryo.note", "matryo.source", "matryo.index"
"""Properties of the items' collection; the last, the index's name, also of a collection beside it."""
MOST = 16_384
"""Items that Milvus answers a search or a query with."""
SPARE = 8
"""Items an exact scan is asked for beyond its limit, to see whether the last of them tie."""
RECEIVED = 32 << 20
"""Bytes of one answer, about; queries are asked in such parts."""
PASSES = 5
"""Over what differs, when a column is made while others write."""
IDS = 1000
"""Ids in one expression."""
SEVERAL_FIELDS = (2, 4)
"""The first release with several vector fields in a collection."""


class MilvusIndex(EngineIndex):
    """An index in a Milvus server."""

    can: ClassVar[Can] = Can(
        "Milvus",
        {"flat": ("float32", "binary"), "hnsw": ("float32",), "ivf": ("float32", "int8", "binary")},
        ("float32",),
        widest=32_768,
        kept=("float32",),
        ties=False,  # of graphs and bits; exact scans keep the order of writing
        any_plan=False,
        commits=False,
    )

    def __init__(self, address: MilvusAddress, note: Note, read_only: bool) -> None:
        super().__init__(address, note, read_only)
        self._place = address
        self._connection = Connection(address, self._where)

    # Making and opening.

    @classmethod
    def default_plan(cls, width: int) -> Plan:
        if width <= 256:
            return Plan((Stage(width, "float32"),))
        graph = Stage(256, "float32", "hnsw", (("M", 16), ("ef", 200)), keep=200)
        return Plan((graph, Stage(width, "float32")))

    @classmethod
    def check_plan(cls, plan: str | Plan, width: int) -> Plan:
        chosen = super().check_plan(plan, width)
        first = chosen.stages[0]
        if dict(first.options).get("at", first.width) != first.width:
            raise InputError(f"stage 1 ({first}): Milvus sorts and scans by the same prefix; leave `at` out")
        if (first.keep or 1) > MOST:
            raise InputError(f"stage 1 ({first}): Milvus hands on at most {MOST:,} items")
        return chosen

    @classmethod
    def _create(cls, path: str | Path, note: Note) -> Self:
        made = cls(cls._address(path), replace(note, extra={"made": uuid.uuid4().hex}), False)
        return made._made(made._make)

    def _make(self) -> None:
        name, width = self.address.name, self._note.width
        if self._ask("has_collection", name):
            there = self._properties(name)
            noted = Note.read(there[NOTE], self.address) if NOTE in there else None
            if noted is not None and noted.extra["made"] == self._note.extra["made"]:
                self._note = noted  # by an attempt whose answer was lost
                return
            if noted is not None or there.get(OWNER) != name:
                raise InputError(
                    f"{self.address}: there is a collection of this name already; open it with Index.open, or choose "
                    "another name"
                )
            self._ask("drop_collection", name)  # a making that was cut off
        first = words.column_of(Plan.parse(self._note.plan).stages[0], width)
        columns, said = [Column(Stage(width, "float32"), width)], {}
        if first.name != words.FULL:
            apart = not self._several_fields()
            home = f"{name}__{first.name}" if apart else name
            said[first.key] = {"in": home, "ready": True}
            if apart:
                self._make_beside(first, home)
            else:
                columns.append(first)
        self._make_collection(name, columns, whole=True)
        # With its note the index is there; without, Index.create begins anew.
        noted = replace(self._note, extra={**self._note.extra, "columns": said})
        self._write_note(noted)
        self._note = noted

    def _make_beside(self, column: Column, home: str) -> None:
        """An empty collection for a column that lies apart, in the place of one that was left over."""
        if self._ask("has_collection", home):
            if self._properties(home).get(OWNER) != self.address.name:
                raise InputError(f"{self.address}: {home} is there already and not of this index; choose another name")
            self._ask("drop_collection", home)
        self._make_collection(home, [column], whole=False)

    def _make_collection(self, name: str, columns: list[Column], whole: bool) -> None:
        schema, indexes = words.schema_of(columns, whole)
        owner = {OWNER: self.address.name}
        self._ask("create_collection", name, schema=schema, properties=owner, consistency_level="Strong")
        self._ask("create_index", name, indexes, sync=False)  # the client would sleep over an empty one
        self._ask("load_collection", name, timeout=LONG)

    @classmethod
    def _open(cls, path: str | Path, read_only: bool) -> Self:
        opened = cls(cls._address(path), Note(1, "1:float32", "float32"), read_only)
        try:
            opened._latest()
            for home in opened._homes():
                opened._trying(partial(opened._ask, "load_collection", home, timeout=LONG))
        except BaseException:
            opened.close()
            raise
        return opened

    def _several_fields(self) -> bool:
        """Whether a collection may have several vector fields."""
        found = re.search(r"(\d+)\.(\d+)", str(self._ask("get_server_version")))
        return found is None or (int(found[1]), int(found[2])) >= SEVERAL_FIELDS

    # The note.

    def _read_note(self) -> Note:
        if not self._ask("has_collection", self.address.name):
            raise NoIndexError(f"{self.address} holds no index; make one with Index.create(url, width=...)")
        found = self._properties(self.address.name)
        if NOTE not in found:
            if found.get(OWNER) == self.address.name:
                raise NoIndexError(
                    f"{self.address}: its making was cut off; make it again with Index.create(url, width=...)"
                )
            raise FormatError(f"{self.address} is a collection that Matryo did not make; choose another name")
        noted = Note.read(found[NOTE], self.address)
        return replace(noted, source=json.loads(found[SOURCE])) if SOURCE in found else noted

    def _write_note(self, note: Note) -> None:
        # What was read of the source stands apart, so that a plan and a batch noted at once do not undo each other.
        self._set(self.address.name, NOTE, replace(note, source=None).as_text())

    def _properties(self, collection: str) -> dict[str, str]:
        return dict(self._ask("describe_collection", collection).get("properties", {}))

    def _set(self, collection: str, name: str, value: str) -> None:
        self._ask("alter_collection_properties", collection, {name: value})

    def _columns(self, note: Note) -> list[tuple[Column, str]]:
        """Columns besides that of the full vectors, and where each lies."""
        return [(words.read_column(key, note.width), said["in"]) for key, said in note.extra["columns"].items()]

    def _homes(self) -> list[str]:
        """Collections, that of the items last."""
        beside = dict.fromkeys(home for _, home in self._columns(self._note) if home != self.address.name)
        return [*beside, self.address.name]

    # Items.

    def _write(
        self,
        keys: list[str],
        units_ND: Float32s,
        documents: list[str | None],
        metadata: list[str | None],
        source: dict[str, Any] | None,
    ) -> None:
        words.check_sizes(keys, documents, metadata)
        sizes = [
            6 * self._note.width + 2 * len(text or "") + 3 * len(fields or "") + len(key)
            for key, text, fields in zip(keys, documents, metadata, strict=True)
        ]
        with self._alone():
            if keys:
                self._note = self._read_note()  # another process may have prepared a plan
                row = time.time_ns()
                for part in words.parts(len(keys), sizes):
                    some = (keys[part], units_ND[part], documents[part], metadata[part])
                    self._put(self._columns(self._note), row + part.start, *some)
            if source is not None:
                self._set(self.address.name, SOURCE, json.dumps(source))

    def _put(
        self,
        columns: list[tuple[Column, str]],
        row: int,
        keys: Sequence[str],
        units_ND: Float32s,
        documents: Sequence[str | None],
        metadata: Sequence[str | None],
    ) -> None:
        """Upsert a part of a batch: what lies beside first, the items last."""
        mine = [Column(Stage(self._note.width, "float32"), self._note.width)]
        for column, home in columns:
            if home == self.address.name:
                mine.append(column)
            else:
                self._ask("upsert", home, words.rows_of(keys, row, [column], units_ND, metadata, None))
        self._ask("upsert", self.address.name, words.rows_of(keys, row, mine, units_ND, metadata, documents))

    def _remove(self, keys: list[str]) -> int:
        there = 0
        with self._alone():
            self._note = self._read_note()  # another process may have prepared a plan
            for some in _tens(keys, IDS):
                there += len(self._ask("query", self.address.name, filter=words.among(some), output_fields=["id"]))
                for home in reversed(self._homes()):
                    self._ask("delete", home, ids=some)
        return there

    def _count(self) -> int:
        return int(self._ask("query", self.address.name, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def _sample(self, n: int, seed: int) -> tuple[list[str], Float32s]:
        keys = sorted(row["id"] for row in self._all(self.address.name, ["id"]))
        drawn = np.random.default_rng(seed).permutation(len(keys))[:n]
        found = self._items([keys[i] for i in drawn], "", (words.FULL,))
        return list(found), np.array([item[words.FULL] for item in found.values()], dtype=np.float32)

    def _items(self, keys: Sequence[str], where: str, fields: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Items by id, those that are there and match."""
        found: dict[str, dict[str, Any]] = {}
        for some in _tens(keys, IDS):
            rows = self._ask("query", self.address.name, filter=words.among(some, where), output_fields=["id", *fields])
            found |= {row["id"]: row for row in rows}
        return found

    def _all(self, collection: str, fields: list[str]) -> Iterator[dict[str, Any]]:
        """Every row of a collection, in parts."""
        walk = self._ask(
            "query_iterator", collection, batch_size=IDS, filter="", output_fields=fields, consistency_level="Strong"
        )
        try:
            while rows := self._connection.said(walk.next):
                yield from rows
        finally:
            walk.close()

    # Searching.

    def _find(self, asked: Asked) -> tuple[list[Found], list[StageReport] | None]:
        started, full, first = time.perf_counter(), asked.units.shape[1], asked.plan.stages[0]
        if asked.k > MOST:
            raise InputError(f"k is {asked.k:,}; Milvus answers with at most {MOST:,} items")
        column, home = self._home(asked)
        steps = _steps(asked, full, column.exact)
        limit = max(asked.k, first.keep or asked.k)
        size = min(MOST, limit + SPARE) * (4 * full + 512)
        found: list[Found] = []
        kept: list[list[int]] = [[] for _ in steps]
        for units in _tens(asked.units, max(1, RECEIVED // size)):
            lists, items = self._shortlists(column, home, first, units, limit, words.expression(asked.where))
            keys, place = list(items), {key: n for n, key in enumerate(items)}
            vectors = np.array([items[key][words.FULL] for key in keys], dtype=np.float32).reshape(-1, full)
            for unit, mine in zip(units, lists, strict=True):
                order = np.array([place[key] for key in mine if key in place], dtype=np.int64)
                scores = np.empty(len(order), dtype=np.float32)
                for n, (width, most) in enumerate(steps):
                    if width is not None:
                        scores = words.cosines(vectors[order], unit, width)
                        rows = np.array([items[keys[i]]["row"] for i in order], dtype=np.int64)
                        best = np.lexsort((rows, -scores))[:most]
                        order, scores = order[best], scores[best]
                    kept[n].append(len(order))
                found.append(_found([items[keys[i]] for i in order], scores.tolist()))
        took = 1e3 * (time.perf_counter() - started)
        return found, self._reports(asked, full, kept, took) if asked.explain else None

    def _home(self, asked: Asked) -> tuple[Column, str]:
        """The column that the first stage scans, and where it lies."""
        column = words.column_of(asked.plan.stages[0], asked.units.shape[1])
        if column.name == words.FULL:
            return column, self.address.name
        said = self._note.extra["columns"].get(column.key)
        if said is None:  # prepared by another process since
            self._note = self._read_note()
            said = self._note.extra["columns"].get(column.key)
        if said is None or not said["ready"]:
            ready = [words.FULL, *(key for key, value in self._note.extra["columns"].items() if value["ready"])]
            raise InputError(
                f"{self.address} has nothing prepared for {column.key}; call prepare({str(asked.plan)!r}) once, which "
                f"makes it from the full vectors. It has {', '.join(ready)}"
            )
        return column, str(said["in"])

    def _shortlists(
        self, column: Column, home: str, first: Stage, units: Float32s, limit: int, where: str
    ) -> tuple[list[list[str]], dict[str, dict[str, Any]]]:
        """What the first stage finds, ids best first for each query, and the items they are."""
        # The items of one query come along with its hits; those of many overlap, and are read once.
        inside = home == self.address.name and len(units) == 1
        fields = list(words.ITEM) if inside else []
        wide = min(MOST, limit + SPARE) if column.exact else limit
        found = self._nearest(column, home, first, units, wide, where, fields)
        for q in range(len(units) if column.exact else 0):
            # All that tie with the last are wanted, so that of equal ones those written first are kept.
            most = wide
            while len(found[q]) == most < MOST and _tied(found[q], limit):
                most = min(MOST, 2 * most)
                found[q] = self._nearest(column, home, first, units[q : q + 1], most, where, fields)[0]
        lists = [[hit["id"] for hit in hits] for hits in found]
        if inside:
            return lists, {hit["id"]: {"id": hit["id"], **hit["entity"]} for hits in found for hit in hits}
        return lists, self._items(list(dict.fromkeys(key for keys in lists for key in keys)), where, words.ITEM)

    def _nearest(
        self, column: Column, home: str, first: Stage, units: Float32s, limit: int, where: str, fields: list[str]
    ) -> list[list[dict[str, Any]]]:
        found = self._ask(
            "search", home, data=column.encode(units), anns_field=column.name, limit=limit, filter=where,
            output_fields=fields, search_params=column.scan(first, limit),
        )  # fmt: skip
        return [list(hits) for hits in found] or [[] for _ in units]

    def _reports(self, asked: Asked, full: int, kept: list[list[int]], took: float) -> list[StageReport]:
        stages = [str(stage) for stage in asked.plan.stages]
        if len(kept) > len(stages):
            stages.append(f"{full}:float32")
        considered, reports = len(self) * len(asked.units), []
        for n, (stage, each) in enumerate(zip(stages, kept, strict=True)):
            reports.append(StageReport(stage, considered, sum(each), took if n == len(kept) - 1 else 0.0, each))
            considered = sum(each)
        return reports

    # Columns that lie beside.

    def prepare(self, plan: str | Plan | None = None) -> None:
        """Make what the plan's first stage scans, from the full vectors, and wait until its index is built.

        Other writers may go on meanwhile; what they write at the very moment of the first copy is found by `check` and
        mended by `compact`.
        """
        noted = self._latest()
        column = words.column_of(
            self.check_plan(noted.plan if plan is None else plan, noted.width).stages[0], noted.width
        )
        home = self.address.name
        if column.name != words.FULL:
            said = noted.extra["columns"].get(column.key)
            if said is None or not said["ready"]:
                self._refuse_reading()
                self._trying(lambda: self._add(column))
            home = self._note.extra["columns"][column.key]["in"]
        if not self._read_only and len(self):
            self._trying(lambda: self._settle({self.address.name: words.FULL, home: column.name}))

    def _add(self, column: Column) -> None:
        noted = self._latest()
        home = f"{self.address.name}__{column.name}"
        if column.key not in noted.extra["columns"]:
            self._make_beside(column, home)
            self._note_column(column, home, ready=False)  # from now on writers write it too
        with self._alone():
            for _ in range(PASSES):
                if not self._mend(column, home):
                    break
        self._note_column(column, home, ready=True)

    def _note_column(self, column: Column, home: str, ready: bool) -> None:
        said = {column.key: {"in": home, "ready": ready}}
        self._change(lambda note: replace(note, extra=note.extra | {"columns": note.extra["columns"] | said}))

    def _mend(self, column: Column, home: str) -> int:
        """Make a collection beside the items equal to them; how many rows were not. `row` tells writes apart."""
        gone, stale = self._differing(home)
        for some in _tens(gone, IDS):
            self._ask("delete", home, ids=some)
        step = max(1, words.SENT // (4 * self._note.width))
        for some in _tens(stale, min(IDS, step)):
            items = list(self._items(some, "", ("row", "metadata", words.FULL)).values())
            vectors = np.array([item[words.FULL] for item in items], dtype=np.float32)
            fields = [json.dumps(item["metadata"]) for item in items]
            if items:
                rows = words.rows_of([item["id"] for item in items], 0, [column], vectors, fields, None)
                stamped = [row | {"row": item["row"]} for row, item in zip(rows, items, strict=True)]
                self._ask("upsert", home, stamped)
        return len(gone) + len(stale)

    def _differing(self, home: str) -> tuple[list[str], list[str]]:
        """Ids that lie beside and are no items, and items that do not lie beside as they are."""
        items = {row["id"]: row["row"] for row in self._all(self.address.name, ["id", "row"])}
        there = {row["id"]: row["row"] for row in self._all(home, ["id", "row"])}
        return [key for key in there if key not in items], [k for k, row in items.items() if there.get(k) != row]

    def _settle(self, indexed: dict[str, str]) -> None:
        """Flush, and wait until the indexes are built."""
        for home, name in indexed.items():
            self._ask("flush", home, timeout=LONG)
            started = time.monotonic()
            while time.monotonic() - started < LONG:
                told = self._ask("describe_index", home, index_name=name)
                if int(told.get("pending_index_rows", 0)) == 0:
                    break
                time.sleep(0.2)

    # Keeping.

    def _occupied(self) -> dict[str, Any]:
        columns = self._note.extra["columns"].items()
        return {"columns": {key: said["in"] for key, said in columns if said["ready"]}}

    def check(self) -> CheckReport:
        """Read every item: vectors that are no unit rows are damage; what lies beside and differs is made again."""
        self._latest()
        problems, notes = [], []
        for row in self._trying(lambda: list(self._all(self.address.name, ["id", words.FULL]))):
            length = float(np.linalg.norm(np.asarray(row[words.FULL], dtype=np.float64)))
            if not abs(length - 1) < 1e-3:
                problems.append(f"{row['id']!r} has a vector of length {length:g}; write it again")
        homes = self._homes()
        for home in homes[:-1]:
            gone, stale = self._trying(partial(self._differing, home))
            if gone or stale:
                notes.append(f"{home}: {len(gone)} rows of no item, {len(stale)} items not as they are; run compact")
        return CheckReport(tuple(homes), tuple(problems), tuple(notes))

    def compact(self, store: str | None = None) -> int:
        """Mend what lies beside, and have Milvus merge segments and drop deleted rows; how many rows were no items."""
        self._refuse_reading()
        noted = self._latest()
        if store not in (None, noted.store):
            raise InputError(
                f"{self.address} keeps its vectors as {noted.store}, the one way that Milvus scores exactly"
            )
        mended = 0
        with self._alone():
            for column, home in self._columns(noted):
                if home != self.address.name:
                    mended += self._trying(partial(self._mend, column, home))
        for home in self._homes():
            self._trying(partial(self._ask, "flush", home, timeout=LONG))
        there = int(self._trying(lambda: self._ask("get_collection_stats", self.address.name))["row_count"])
        dead = max(0, there - len(self))
        for home in self._homes():
            self._trying(partial(self._ask, "compact", home, timeout=LONG))
        return dead + mended

    def close(self) -> None:
        """Close the connection; harmless twice."""
        super().close()
        self._connection.close()

    # The connection.

    @classmethod
    def _address(cls, path: str | Path) -> MilvusAddress:
        address = read_milvus(path, OPTIONS)
        if len(address.hosts) > 1:
            raise InputError(f"{address}: give one host, that of the proxy or of the balancer before several")
        return address

    def _where(self) -> str:
        """Where the server listens."""
        return server_of(self._place)

    def _alone(self) -> AbstractContextManager[Any]:
        """While it is held, nobody else in this process writes; for engines that need it."""
        return nullcontext()

    def _ask(self, verb: str, *args: Any, timeout: float | None = None, **given: Any) -> Any:
        self._refuse_closed()
        return self._connection.ask(verb, *args, timeout=timeout, **given)


class MilvusLiteIndex(MilvusIndex):
    """An index in a file of Milvus Lite, which runs in this process and has the file to itself."""

    can: ClassVar[Can] = replace(
        MilvusIndex.can,
        engine="Milvus Lite",
        scans={"flat": ("float32",), "hnsw": ("float32",), "ivf": ("float32", "int8")},
    )

    def __init__(self, address: MilvusAddress, note: Note, read_only: bool) -> None:
        super().__init__(address, note, read_only)
        self._file = Path("/") / address.path
        self._server: Embedded | None = None
        self._guard = threading.Lock()

    @classmethod
    def _address(cls, path: str | Path) -> MilvusAddress:
        address = read_milvus(path, {name: what for name, what in OPTIONS.items() if name == "timeout"})
        if address.hosts or not address.path.endswith(".db"):
            raise InputError(
                f"{address}: give the whole path of a file that ends in .db, and the name of the index behind it: "
                "milvus+lite:///folder/file.db/docs"
            )
        return address

    @classmethod
    def _open(cls, path: str | Path, read_only: bool) -> Self:
        address = cls._address(path)
        if not (Path("/") / address.path).exists():
            raise NoIndexError(f"{address} holds no index; make one with Index.create(url, width=...)")
        return super()._open(path, read_only)

    def _several_fields(self) -> bool:
        return True

    def _where(self) -> str:
        return f"http://127.0.0.1:{self._running().port}"

    def _alone(self) -> AbstractContextManager[Any]:
        self._refuse_closed()
        return self._running().writing

    def _running(self) -> Embedded:
        with self._guard:
            if self._server is None:
                self._server = Embedded.on(self._file, self.address)
            return self._server

    def close(self) -> None:
        super().close()
        with self._guard:
            server, self._server = self._server, None
        if server is not None:
            server.leave()


def _steps(asked: Asked, full: int, exact: bool) -> list[tuple[int | None, int]]:
    """(width to score by, how many to keep) for each report; a first stage that Milvus has ordered has no width."""
    first, *later = asked.plan.stages
    final = (asked.width or full, asked.k)
    steps: list[tuple[int | None, int]] = [(first.width if exact else None, max(asked.k, first.keep or asked.k))]
    steps += [(stage.width, max(asked.k, stage.keep or asked.k)) for stage in later]
    last = asked.plan.stages[-1]
    same = last.width == final[0] and last.code == "float32" and (len(steps) > 1 or exact)
    return [*steps[:-1], final] if same else [*steps, final]


def _tied(hits: list[dict[str, Any]], limit: int) -> bool:
    return float(hits[limit - 1]["distance"]) - float(hits[-1]["distance"]) <= TOLERANCE


def _found(items: Iterable[dict[str, Any]], scores: list[float]) -> Found:
    rows = list(items)
    documents = [row["document"] if row["given"] & words.HAS_DOCUMENT else None for row in rows]
    fields = [
        json.dumps(row["metadata"], ensure_ascii=False) if row["given"] & words.HAS_METADATA else None for row in rows
    ]
    return Found([row["id"] for row in rows], scores, documents, fields)


def _tens(values: Any, size: int) -> Iterator[Any]:
    """Parts of at most so many."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
