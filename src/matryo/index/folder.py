"""`FolderIndex`: upsert, delete, search, check, compact over one folder. Many readers, one writer.

A folder holds `catalogue.sqlite` (the commit point), `vectors-<generation>.f16` (or `.f32`), `head`, `lock`, and
`codes/`, which may be deleted at any time. A reader sees a new commit at its next call; nothing has to be reopened.
"""

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from matryo.core.errors import DamagedError, InputError, NoIndexError, StorageError
from matryo.core.files import fsync_folder, storage_errors
from matryo.core.plan import Plan, Stage
from matryo.core.prefix import check_width
from matryo.core.promise import Floats, Promise
from matryo.index import calibration
from matryo.index import catalogue as cat
from matryo.index.funnel import StageReport, default_plan, run
from matryo.index.hits import Hits, filtered, hits_of, matching
from matryo.index.index import Index
from matryo.index.items import Batch, Metadata, check_documents, check_ids, check_metadata, read_ids
from matryo.index.opening import (
    Lock,
    check_k,
    check_model,
    check_store,
    checked_plan,
    folder_of,
    insist_on_model,
    refuse_taken,
    unit_queries,
    whole_reading,
)
from matryo.index.prefixes import nearest
from matryo.index.report import CheckReport
from matryo.index.snapshot import VERIFY_AT_OPEN, Snapshot, View, derived, load_snapshot, vectors_path
from matryo.index.vectors import check_rows, unit_chunks
from matryo.index.where import compile_where
from matryo.index.writer import Writer, examine


class FolderIndex(Index):
    """The embedded engine: an index in a folder. What its verbs take and give is said at `Index`."""

    def __init__(self, folder: Path, catalogue: cat.Catalogue, writer: Writer | None, snapshot: Snapshot) -> None:
        """Not for callers: use `create` or `open`."""
        self._folder, self._catalogue, self._writer = folder, catalogue, writer
        self._writing = threading.RLock()
        """Held by whoever writes, for as long as that takes. Searches never wait for it."""
        self._lock = threading.RLock()
        """Held for a moment, by whoever changes what was seen last."""
        # The latest commit seen: its state row as it lay there, and the snapshot. Replaced as one.
        self._seen: tuple[tuple[str, bytes] | None, Snapshot] = (None, snapshot)
        self._items_verified = False
        self._closed = False

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
        """A new, empty index in a folder that does not exist yet, or is empty. It appears whole or not at all."""
        folder = folder_of(path)
        width = check_width(width, 1 << 16)
        chosen = checked_plan(default_plan(width) if plan is None else plan, width)
        state = cat.State(
            width, str(chosen), check_model(model), store=check_store("float16" if store is None else store)
        )
        refuse_taken(folder)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with storage_errors(f"creating {folder}"):
                temporary.mkdir(parents=True)
                vectors_path(temporary, 1, state.store).touch()
                cat.create(temporary, state)
                (temporary / "lock").touch()
                fsync_folder(temporary)
                try:
                    os.rename(temporary, folder)
                except OSError:
                    refuse_taken(folder)
                    raise
                fsync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False, model: dict[str, Any] | None = None) -> Self:
        """Open an index; for writing, unless `read_only`. Small files are verified now, large ones on first use.

        Raises:
            InputError: no index there, or another model made its vectors.
            LockedError: another writer has it open.
            FormatError, DamagedError: it cannot be read safely.
        """
        folder = folder_of(path)
        if not (folder / cat.NAME).is_file():
            what = "is damaged: its catalogue is gone" if any(folder.glob("vectors-*")) else "holds no index"
            raise (DamagedError if "damaged" in what else NoIndexError)(
                f"{folder} {what}; make one with Index.create({str(folder)!r}, width=...)"
            )
        lock = None if read_only else Lock(folder)
        catalogue: cat.Catalogue | None = None
        try:
            with storage_errors(f"opening {folder}"):
                catalogue = cat.Catalogue(folder, writable=lock is not None)
                with whole_reading(folder, catalogue) as (_, snapshot):
                    pass
                insist_on_model(snapshot.state.model, model, folder)
                if snapshot.vectors.stored.nbytes <= VERIFY_AT_OPEN:
                    snapshot.vectors.ensure_all()
                writer = Writer(folder, catalogue, snapshot, lock.release) if lock else None
                index = cls(folder, catalogue, writer, snapshot)
                if catalogue.path.stat().st_size <= VERIFY_AT_OPEN:
                    with index._reading() as (connection, seen):
                        index._verify_items(connection, seen)
                return index
        except BaseException:
            if catalogue is not None:
                catalogue.close()
            if lock is not None:
                lock.release()
            raise

    def upsert(
        self,
        ids: Sequence[str],
        vectors: Any,
        documents: Sequence[str | None] | None = None,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> int:
        return self._upsert(Batch(ids, vectors, documents, metadata))

    def _upsert(self, batch: Batch, source: dict[str, Any] | None = None) -> int:
        writer, vectors = self._writable(), batch.vectors
        keys = check_ids(batch.ids)
        rows = check_rows(vectors, self._seen[1].state.width, "vectors") if keys or len(vectors) else vectors
        if len(rows) != len(keys):
            raise InputError(f"{len(keys)} ids but {len(rows)} vectors; give one vector per id")
        texts, fields = check_documents(batch.documents, len(keys)), check_metadata(batch.metadata, len(keys))
        if not keys and source is None:
            return 0
        chunks = unit_chunks(rows) if keys else iter(())
        with self._writing:
            writer.upsert(self.snapshot(), keys, chunks, texts, fields, source)
        return len(keys)

    def extend(self, batches: Iterable[Batch], source: str | None = None) -> int:
        written = 0
        read = 0 if source is None else self.read_from(source)
        for batch in batches:
            read += len(batch.ids) if batch.read is None else batch.read
            written += self._upsert(batch, None if source is None else {"fingerprint": source, "read": read})
        return written

    def read_from(self, source: str) -> int:
        with self._reading() as (_, snapshot):
            state = snapshot.state
        if state.source is None and not state.end:
            return 0
        if state.source is None or state.source["fingerprint"] != source:
            raise InputError(
                f"{self._folder} was begun from another source; go on with that one, or build a new index from this one"
            )
        return int(state.source["read"])

    def delete(self, ids: Sequence[str]) -> int:
        writer = self._writable()
        keys = read_ids(ids)
        with self._writing:
            return writer.delete(self.snapshot(), keys)

    def search(
        self,
        queries: Any,
        k: int = 10,
        plan: str | Plan | None = None,
        where: dict[str, Any] | None = None,
        explain: bool = False,
        width: int | None = None,
    ) -> Hits:
        """As `Index.search`. When few rows match `where` they are all scored exactly, without a funnel."""
        k = check_k(k)
        if width is not None and plan is not None:
            raise InputError("width is a search without a plan; give one of the two")
        condition = None if where is None else compile_where(where)
        reports: list[StageReport] | None = [] if explain else None
        with self._reading() as (connection, snapshot):
            state = snapshot.state
            if width is None:
                chosen = checked_plan(state.plan if plan is None else plan, state.width)
            else:
                chosen = Plan((Stage(check_width(width, state.width), "float32"),))
            unit = unit_queries(queries, state.width)
            matches = None
            if condition is not None:
                self._verify_items(connection, snapshot)
                matches = matching(connection, snapshot, condition)
            if width is not None and width < state.width:
                answers = nearest(View(snapshot, matches), unit, width, k, reports)
            elif matches is None:
                answers = run(chosen, unit, k, View(snapshot), reports)
            else:
                answers = filtered(snapshot, matches, chosen, unit, k, reports)
            hits = hits_of(connection, answers, reports)
            if explain:
                made = None if state.promise is None else Promise.from_json(state.promise)
                said = calibration.note(made, chosen, k, state.live, condition is not None)
                hits = replace(hits, promise=said)
            return hits

    def prepare(self, plan: str | Plan | None = None) -> None:
        """Derive all that a plan needs, by default the index's own, and return when it is there.

        A search does not wait for a graph or cells of many rows: they are built aside, and until they are there every
        row is scanned by its code, exactly and slowly. `compact`, and `close` of an index that is open for writing,
        leave them in files for the next to open.
        """
        with self._reading() as (_, snapshot):
            chosen = checked_plan(snapshot.state.plan if plan is None else plan, snapshot.state.width)
        self._prepare(snapshot, chosen)
        if self._writer is not None:
            self._writer.derived()

    def _prepare(self, snapshot: Snapshot, plan: Plan) -> None:
        if snapshot.state.end:
            for width, name in derived(plan, snapshot.state):
                snapshot.codes.prepare(width, name, snapshot.vectors)

    def recalls(self, queries: Any, k: int = 10) -> Callable[[str | Plan], Floats]:
        k = check_k(k)
        with self._reading() as (_, snapshot):
            width = snapshot.state.width
            unit = unit_queries(queries, width)
        found = calibration.recalls_of(View(snapshot), unit, k)

        def of(plan: str | Plan) -> Floats:
            chosen = checked_plan(plan, width)
            self._prepare(snapshot, chosen)
            return found(chosen)

        return of

    def calibrate(
        self,
        queries: Any = None,
        recall: float = 0.95,
        confidence: float = 0.95,
        k: int = 10,
        plan: str | Plan | None = None,
    ) -> Promise:
        writer, k = self._writable(), check_k(k)
        with self._reading() as (_, snapshot):
            state = snapshot.state
            chosen = checked_plan(state.plan if plan is None else plan, state.width)
            unit = None if queries is None else unit_queries(queries, state.width)
        self._prepare(snapshot, chosen)
        promise = calibration.calibrated(snapshot, unit, chosen, k, recall, confidence)
        with self._lock:
            writer.promise(self.snapshot(), promise)
        return promise

    def stats(self) -> dict[str, Any]:
        """What the index is and how many bytes it takes, in memory (`codes`, and each by row) and on the disk."""
        with self._reading() as (_, snapshot):
            state = snapshot.state
            loaded = snapshot.codes.loaded()
        with storage_errors(f"reading {self._folder}"):
            files = dict(_sizes(self._folder))
        return {
            "items": state.live,
            "dead_rows": state.end - state.live,
            "width": state.width,
            "plan": state.plan,
            "promise": state.promise,
            "model": state.model,
            "format": state.format,
            "generation": state.generation,
            "commits": state.seq,
            "store": state.store,
            "vector_bytes": snapshot.vectors.stored.nbytes,
            "codes": {f"{width}:{name}": column.nbytes for (width, name), column in sorted(loaded.items())},
            "bytes_per_item": {
                f"{width}:{name}": round(held.nbytes / max(1, state.end), 2)
                for (width, name), held in sorted(loaded.items())
            },
            "files": files,
        }

    def check(self) -> CheckReport:
        """Read and verify every byte that matters; says what is damaged instead of raising."""
        self._refuse_closed()
        return examine(self._folder, self._catalogue)

    def compact(self, store: str | None = None) -> int:
        """Rewrite the index without its dead rows and derive its codes anew; the number of rows dropped.

        Searches, here and in other processes, go on meanwhile over what was there before. Whatever goes wrong, the
        index is as it was or it is compacted.

        Args:
            store: "float16" or "float32" to change how the full vectors lie on the disk; by default as they do.
        """
        writer = self._writable()
        with self._writing:
            before = self.snapshot()
            fresh = writer.compact(before, before.state.store if store is None else check_store(store))
            with self._lock:
                if self._seen[1].state.seq <= fresh.state.seq:
                    self._seen = (None, fresh)
            before.codes.abandon()
            writer.tidy(fresh.state)
        return before.state.end - fresh.state.end

    def close(self) -> None:
        """Close every file and give up the lock; harmless twice. A writer leaves its codes for the next to open."""
        with self._writing, self._lock:
            if self._closed:
                return
            if self._writer is not None:
                # Codes are a cache: that they could not be saved costs the next opening some time, nothing else.
                with suppress(DamagedError, StorageError), self._reading() as (_, snapshot):
                    self._writer.save_codes(snapshot)
            self._closed = True
            self._seen[1].codes.abandon()
            self._catalogue.close()
            if self._writer is not None:
                self._writer.close()

    def __len__(self) -> int:
        with self._reading() as (_, snapshot):
            return snapshot.state.live

    def __repr__(self) -> str:
        return (
            f"FolderIndex({str(self._folder)!r}, width={self._seen[1].state.width}, plan={self._seen[1].state.plan!r})"
        )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InputError(f"this index is closed; open it again with Index.open({str(self._folder)!r})")

    def _writable(self) -> Writer:
        self._refuse_closed()
        if self._writer is None:
            raise InputError("this index was opened read_only; open it without to write")
        return self._writer

    @contextmanager
    def _reading(self) -> Iterator[tuple[sqlite3.Connection, Snapshot]]:
        """A read transaction and the snapshot of the same commit."""
        for _ in range(100):
            self._refuse_closed()
            with self._catalogue.reading() as connection:
                snapshot = self._fitting(connection)
                if snapshot is not None:
                    yield connection, snapshot
                    return
        raise StorageError(f"{self._folder}: compacted away again and again while being read")

    def snapshot(self) -> Snapshot:
        """What a search of now would see: for what measures an index from beneath. Not for keeping."""
        with self._reading() as (_, snapshot):
            return snapshot

    def _fitting(self, connection: sqlite3.Connection) -> Snapshot | None:
        """The snapshot of this transaction; None when the transaction is behind and must begin anew."""
        body = cat.read_body(connection)
        seen, snapshot = self._seen
        if body == seen:
            return snapshot
        state = cat.parse_state(*body)
        with self._lock:
            snapshot = self._seen[1]
            if state.seq < snapshot.state.seq:
                return None
            if state.seq > snapshot.state.seq:
                try:
                    snapshot = load_snapshot(self._folder, connection, state, snapshot)
                except FileNotFoundError:
                    return None
            self._seen = (body, snapshot)
            return snapshot

    def _verify_items(self, connection: sqlite3.Connection, snapshot: Snapshot) -> None:
        if not self._items_verified:
            cat.verify_items(connection, snapshot.live)
            self._items_verified = True


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and bytes of every file; one that a compaction removes meanwhile is left out."""
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):
            if path.is_file():
                yield str(path.relative_to(folder)), path.stat().st_size
