"""The one writer of an index: batches, deletions, compaction, and the check of everything on the disk.

The order of every write: bytes past the committed end of the vectors file, fsync, then one SQLite transaction that
moves the end. Memory changes last, after everything that may refuse.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import MatryoError
from matryo.core.files import digest, fsync_folder, storage_errors
from matryo.core.plan import Plan
from matryo.core.promise import Promise
from matryo.index import catalogue as cat
from matryo.index.codes import CodeStore
from matryo.index.items import item_digest
from matryo.index.opening import whole_reading
from matryo.index.report import CheckReport
from matryo.index.snapshot import Snapshot, derived, load_snapshot, vectors_path
from matryo.index.vectors import CHUNK_ROWS, Appender, Block, Float32s, Vectors


class Writer:
    """Holds the lock and the writing end of the vectors file. Calls come one at a time, with the current snapshot."""

    def __init__(self, folder: Path, catalogue: cat.Catalogue, snapshot: Snapshot, release: Callable[[], None]) -> None:
        self._folder, self._catalogue, self._release = folder, catalogue, release
        self._appender = self._open(snapshot)
        self._dirty = False
        self._sweep(snapshot.state)

    def _open(self, snapshot: Snapshot) -> Appender:
        state = snapshot.state
        last = snapshot.vectors.blocks[-1] if snapshot.vectors.blocks else None
        return Appender(
            vectors_path(self._folder, state.generation, state.store), state.store, state.width, state.end, last
        )

    def _sweep(self, state: cat.State) -> None:
        """Remove what a killed process left: vectors and codes of other generations, temporary files."""
        keep = vectors_path(self._folder, state.generation, state.store).name
        for path in [
            *self._folder.glob("vectors-*"),
            *self._folder.glob("codes/*"),
            *self._folder.glob("codes/.*.tmp"),
        ]:
            if path.name != keep and not (path.parent.name == "codes" and path.name.startswith(f"{state.generation}-")):
                with suppress(OSError):
                    path.unlink()

    def upsert(
        self,
        snapshot: Snapshot,
        ids: list[str],
        chunks: Iterable[Float32s],
        documents: list[str | None],
        metadata: list[str | None],
        source: dict[str, Any] | None = None,
    ) -> None:
        """One batch, one commit; with it, how far its source has been read."""
        state = snapshot.state
        with storage_errors(f"writing to {self._folder}"):
            try:
                appended = self._appender.append(chunks)
                with self._catalogue.writing() as connection:
                    dead = self._kill(connection, ids, state.seq + 1)
                    rows = range(state.end, appended.end)
                    connection.executemany(
                        "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
                        ((*item, item_digest(*item)) for item in zip(rows, ids, documents, metadata, strict=True)),
                    )
                    _write_blocks(connection, appended.blocks)
                    after = replace(
                        state,
                        seq=state.seq + 1,
                        end=appended.end,
                        live=state.live - len(dead) + len(ids),
                        dead_sum=_dead_sum(state, dead),
                        source=source or state.source,
                    )
                    cat.write_state(connection, after)
            except BaseException:
                self._recover(state)
                raise
        self._appender.accept(appended)
        self._committed(after)

    def delete(self, snapshot: Snapshot, ids: list[str]) -> int:
        """One commit; none at all when no id is there."""
        state = snapshot.state
        with storage_errors(f"writing to {self._folder}"), self._catalogue.writing() as connection:
            dead = self._kill(connection, ids, state.seq + 1)
            if dead:
                after = replace(state, seq=state.seq + 1, live=state.live - len(dead), dead_sum=_dead_sum(state, dead))
                cat.write_state(connection, after)
        if dead:
            self._committed(after)
        return len(dead)

    def promise(self, snapshot: Snapshot, promise: Promise) -> None:
        """The calibrated plan becomes the index's own, and its promise stands beside it: one commit."""
        state = snapshot.state
        after = replace(state, seq=state.seq + 1, plan=str(promise.plan), promise=promise.as_json())
        with storage_errors(f"writing to {self._folder}"), self._catalogue.writing() as connection:
            cat.write_state(connection, after)
        self._committed(after)

    def compact(self, snapshot: Snapshot, store: str) -> Snapshot:
        """Copy the live rows into the next generation, derive its codes, switch to it in one commit; the new snapshot.

        Everything slow is done beside the old generation, which readers go on using: vectors, codes and their files are
        complete before the commit that makes them the index.
        """
        state = snapshot.state
        rows = np.flatnonzero(snapshot.live)
        after = replace(
            state,
            generation=state.generation + 1,
            seq=state.seq + 1,
            end=len(rows),
            live=len(rows),
            dead_sum=0,
            store=store,
        )
        final = vectors_path(self._folder, after.generation, store)
        temporary = final.with_name(final.name + ".tmp")
        appender: Appender | None = None
        with storage_errors(f"compacting {self._folder}"):
            try:
                appender = Appender(temporary, store, state.width, 0, None, fresh=True)
                parts = (rows[at : at + CHUNK_ROWS] for at in range(0, len(rows), CHUNK_ROWS))
                appended = appender.append(snapshot.vectors.take_stored(part) for part in parts)
                appender.accept(appended)
                os.replace(temporary, final)
                fsync_folder(self._folder)
                vectors = Vectors(final, store, state.width, after.end, appended.blocks)
                codes = CodeStore(self._folder / "codes", after.generation, {})
                fresh = Snapshot(after, vectors, np.ones(after.end, dtype=bool), codes)
                saved = _save(fresh, _wanted(snapshot))
                with self._catalogue.writing() as connection:
                    _renumber(connection, rows)
                    for table in ("deaths", "blocks", "codes"):
                        connection.execute(f"DELETE FROM {table}")
                    _write_blocks(connection, appended.blocks)
                    _write_codes(connection, saved)
                    cat.write_state(connection, after)
            except BaseException:
                if appender is not None:
                    appender.close()
                self._recover(state)
                raise
        old, self._appender = self._appender, appender
        old.close()
        self._committed(after)
        self._dirty = False
        return fresh

    def tidy(self, state: cat.State) -> None:
        """After a compaction: remove the old generation's files and give its pages back."""
        self._sweep(state)
        self._catalogue.tidy()

    def derived(self) -> None:
        """Something was derived that is worth a file."""
        self._dirty = True

    def save_codes(self, snapshot: Snapshot) -> None:
        """Leave files of the codes in use, and of those the index's own plan needs, for the next to open."""
        codes = snapshot.codes
        if not self._dirty and all(codes.file_name(*key) in codes.manifest for key in codes.loaded()):
            return
        with storage_errors(f"writing codes in {self._folder}"):
            saved = _save(snapshot, _wanted(snapshot))
            with self._catalogue.writing() as connection:
                _write_codes(connection, saved)
        self._dirty = False

    def close(self) -> None:
        """Close the vectors file and give up the lock."""
        self._appender.close()
        self._release()

    def _kill(self, connection: sqlite3.Connection, ids: list[str], seq: int) -> list[tuple[int, int]]:
        """Delete the items of these ids; (row, seq) of each row that died."""
        wanted = json.dumps(ids, ensure_ascii=False)
        found = connection.execute(
            "SELECT items.row FROM json_each(?) AS wanted CROSS JOIN items ON items.id = wanted.value", (wanted,)
        ).fetchall()
        dead = [(row, seq) for row in sorted({row for (row,) in found})]
        connection.executemany("DELETE FROM items WHERE row = ?", [(row,) for row, _ in dead])
        connection.executemany("INSERT INTO deaths VALUES (?, ?)", dead)
        return dead

    def _committed(self, state: cat.State) -> None:
        self._dirty = True
        cat.write_head(self._folder, state.seq)

    def _recover(self, before: cat.State) -> None:
        """After a failed write: cut off its leftovers, unless the commit went through before the error came."""
        try:
            with self._catalogue.reading() as connection:
                now = cat.parse_state(*cat.read_body(connection))
                snapshot = None if now.seq == before.seq else load_snapshot(self._folder, connection, now)
        except (MatryoError, sqlite3.Error, OSError):
            return  # what lies past the end is never read; the next opening cuts it off
        if snapshot is not None:
            fresh = self._open(snapshot)
            self._appender.close()
            self._appender = fresh
            self._committed(now)
        self._appender.rollback()
        self._sweep(now)


def examine(folder: Path, catalogue: cat.Catalogue) -> CheckReport:
    """Verify every file of an index from the disk, whatever was verified before."""
    problems: list[str] = []
    notes: list[str] = []
    files = [cat.NAME, "head"]
    try:
        with storage_errors(f"reading {folder}"), whole_reading(folder, catalogue) as (connection, snapshot):
            files.append(snapshot.vectors.path.name)
            try:
                snapshot.vectors.ensure_all()
            except MatryoError as error:
                problems.append(str(error))
            cat.verify_items(connection, snapshot.live)
            for name, (size, noted, _) in sorted(snapshot.codes.manifest.items()):
                path = folder / "codes" / name
                files.append(f"codes/{name}")
                try:
                    if path.stat().st_size != size or digest(path) != noted:
                        notes.append(f"{path} is damaged; it is derived and will be made again")
                except FileNotFoundError:  # a compaction may have removed it this moment
                    notes.append(f"{path} is gone; it is derived and will be made again")
    except MatryoError as error:
        problems.append(str(error))
    return CheckReport(tuple(files), tuple(problems), tuple(notes))


def _wanted(snapshot: Snapshot) -> set[tuple[int, str]]:
    """Columns worth a file: those in use and those that the index's own plan needs."""
    return set(snapshot.codes.loaded()) | set(derived(Plan.parse(snapshot.state.plan), snapshot.state))


def _save(snapshot: Snapshot, wanted: set[tuple[int, str]]) -> list[tuple[str, int, str, int]]:
    """Write the files of these columns; the rows of the manifest to commit."""
    saved = [snapshot.codes.save(width, name, snapshot.vectors) for width, name in sorted(wanted)]
    return [row for row in saved if row]


def _write_codes(connection: sqlite3.Connection, saved: list[tuple[str, int, str, int]]) -> None:
    connection.executemany("INSERT OR REPLACE INTO codes VALUES (?, ?, ?, ?)", saved)


def _write_blocks(connection: sqlite3.Connection, blocks: list[Block]) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", [(b.number, b.rows, b.digest) for b in blocks]
    )


def _dead_sum(state: cat.State, dead: list[tuple[int, int]]) -> int:
    pairs = np.array(dead, dtype=np.int64).reshape(-1, 2)
    return (state.dead_sum + cat.dead_sum(pairs[:, 0], pairs[:, 1])) % (1 << 64)


def _renumber(connection: sqlite3.Connection, rows: NDArray[np.int64]) -> None:
    """Item at rows[n] becomes item n. Going upwards no number is taken when its turn comes."""
    same = int((rows == np.arange(len(rows))).sum())  # those before the first dead row stay as they are
    for start in range(same, len(rows), 500):
        part = rows[start : start + 500].tolist()
        items = cat.read_items(connection, part)
        connection.executemany(
            "UPDATE items SET row = ?, digest = ? WHERE row = ?",
            [(new, item_digest(new, *items[old][1:4]), old) for new, old in enumerate(part, start=start)],
        )
    if connection.execute("SELECT count(*) FROM items").fetchone()[0] != len(rows):
        raise sqlite3.DatabaseError("it holds items that are dead or were never written")
