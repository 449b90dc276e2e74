"""The catalogue: one SQLite file, the commit point and the truth for ids, documents, metadata and where vectors lie.

    state    one row: everything about the index, as JSON with a digest; `seq` counts commits
    items    the live items: row of the vectors file, id, document, metadata, digest of all four
    deaths   rows of the vectors file that are dead, and the commit that killed them
    blocks   digests of the blocks of the vectors file
    codes    manifest of the derived code files: size, digest, rows covered

WAL mode with synchronous=FULL: a commit survives a power cut, readers never wait. SQLite drops a damaged tail of its
log without a word, and acknowledged commits with it; the file `head`, written after each commit, is what tells.
"""

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import DamagedError, FormatError, StorageError
from matryo.index.items import item_digest
from matryo.index.vectors import RECOVER, Block

FORMAT = 2
READABLE = (1, 2)
"""Format 1 had float32 rows only and its state did not say so; all else is the same. The first write makes it 2."""
NAME = "catalogue.sqlite"
BUSY_MS = 10_000
CACHE_KB = 16_384
"""Pages a connection keeps, as far as it reads any: ten items of a hundred thousand are read a third quicker than with
SQLite's 2 MB."""
SCHEMA = (
    "CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), body TEXT NOT NULL, digest BLOB NOT NULL)",
    "CREATE TABLE items (row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, document TEXT, metadata TEXT, "
    "digest BLOB NOT NULL)",
    "CREATE TABLE deaths (row INTEGER PRIMARY KEY, seq INTEGER NOT NULL)",
    "CREATE TABLE blocks (block INTEGER PRIMARY KEY, rows INTEGER NOT NULL, digest BLOB NOT NULL)",
    "CREATE TABLE codes (name TEXT PRIMARY KEY, size INTEGER NOT NULL, digest TEXT NOT NULL, rows INTEGER NOT NULL)",
)
REFUSED_BY_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
}


@dataclass(frozen=True)
class State:
    """The one row that says what the index is. Immutable; a commit writes a new one."""

    width: int
    plan: str
    model: dict[str, Any] | None
    generation: int = 1
    seq: int = 0
    end: int = 0
    live: int = 0
    dead_sum: int = 0
    """Sum over `deaths` of a mix of row and seq, so that a damaged list of dead rows cannot bring one back."""
    store: str = "float16"
    """How rows lie in the vectors file, see `vectors.STORES`."""
    promise: dict[str, Any] | None = None
    """What `calibrate` promised of `plan`, as JSON."""
    source: dict[str, Any] | None = None
    """What `Index.extend` reads from: its fingerprint, and how many of its rows have been read."""
    format: int = FORMAT


Item = tuple[int, str, str | None, str | None, bytes]


def dead_sum(rows: NDArray[np.int64], seqs: NDArray[np.int64]) -> int:
    """An order-free 64-bit sum over (row, seq) pairs; splitmix64 as the mixer."""
    x = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seqs.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))


@contextmanager
def sql_errors(path: Path) -> Iterator[None]:
    """sqlite3 errors as ours: the disk refused, or the file is damaged (our SQL is fixed, so nothing else is left)."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in REFUSED_BY_DISK:
            raise StorageError(f"{path}: {error}; what was acknowledged before is still there") from error
        raise DamagedError(f"{path}: {error}; {RECOVER}") from error
    except (UnicodeDecodeError, OverflowError) as error:
        raise DamagedError(f"{path}: holds values that were never written; {RECOVER}") from error


class Catalogue:
    """Connections to one catalogue: a pool for readers (one read transaction each), one for the writer."""

    def __init__(self, folder: Path, writable: bool) -> None:
        self.folder, self.path = folder, folder / NAME
        self._idle: list[sqlite3.Connection] = []
        self._guard = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        if writable:
            with sql_errors(self.path):
                # The writer's connection opens first: it replays what a killed process left in the log.
                self._writer = self._connect("rw")
                try:
                    self._writer.execute("PRAGMA journal_mode = WAL").fetchall()
                    self._writer.execute("PRAGMA synchronous = FULL").fetchall()
                except BaseException:
                    self._writer.close()
                    raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        name = self.path.resolve().as_uri()
        connection = sqlite3.connect(
            f"{name}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000
        )
        try:
            connection.execute("PRAGMA trusted_schema = OFF").fetchall()
            connection.execute("PRAGMA cell_size_check = ON").fetchall()
        except BaseException:
            connection.close()
            raise
        return connection

    def _reader(self) -> sqlite3.Connection:
        with self._guard:
            if self._idle:
                return self._idle.pop()
        connection = self._connect("ro")
        try:
            connection.execute("SELECT one FROM state").fetchall()
        except sqlite3.OperationalError:
            connection.close()
            log = self.path.with_name(NAME + "-wal")
            if os.access(self.folder, os.W_OK, effective_ids=True) or (log.exists() and log.stat().st_size):
                raise
            # A folder that cannot be written and was closed cleanly: nobody can change it under us.
            connection = self._connect("ro&immutable=1")
        except BaseException:
            connection.close()
            raise
        connection.execute(f"PRAGMA cache_size = -{CACHE_KB}").fetchall()
        return connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection inside one read transaction: everything read in it is of one moment."""
        with sql_errors(self.path):
            connection = self._reader()
            try:
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            with self._guard:
                self._idle.append(connection)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The writer's connection inside one transaction, committed at the end, rolled back on any error."""
        assert self._writer is not None
        with sql_errors(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
                raise

    def tidy(self) -> None:
        """Give freed pages back and empty the log. Best effort: a refusal costs space, not data."""
        assert self._writer is not None
        with suppress(sqlite3.OperationalError):
            # Emptying the log waits for readers to leave it; what is left now goes when the last one closes.
            self._writer.execute("PRAGMA busy_timeout = 50").fetchall()
            try:
                self._writer.execute("VACUUM")
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {BUSY_MS}").fetchall()

    def close(self) -> None:
        """Readers first, so that the writer's connection is the last and empties the log."""
        with self._guard:
            idle, self._idle = self._idle, []
        for connection in [*idle, *([self._writer] if self._writer else [])]:
            with suppress(sqlite3.Error):
                connection.close()
        self._writer = None


def create(folder: Path, state: State) -> None:
    """Write a new catalogue into an empty folder."""
    path = folder / NAME
    with sql_errors(path):
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            connection.execute("PRAGMA synchronous = FULL").fetchall()
            connection.execute("BEGIN")
            for statement in SCHEMA:
                connection.execute(statement)
            write_state(connection, state)
            connection.execute("COMMIT")
        finally:
            connection.close()
    write_head(folder, state.seq)


def read_body(connection: sqlite3.Connection) -> tuple[str, bytes]:
    """The state as it lies there."""
    found = connection.execute("SELECT body, digest FROM state WHERE one = 1").fetchone()
    if found is None:
        raise sqlite3.DatabaseError("the state row is missing")
    return found[0], found[1]


def parse_state(body: str, digest: bytes) -> State:
    """The state, if its digest and its format version are right."""
    if hashlib.blake2b(str(body).encode(), digest_size=16).digest() != digest:
        raise sqlite3.DatabaseError("the state row is not what was written")
    fields = json.loads(body)
    if fields.get("format") not in READABLE:
        raise FormatError(
            f"this index is in format {fields.get('format')} and this release reads formats "
            f"{' and '.join(map(str, READABLE))}; "
            "install the release that wrote it, or build the index again"
        )
    return State(**({"store": "float32"} | fields))


def write_state(connection: sqlite3.Connection, state: State) -> None:
    """Replace the state row, inside the caller's transaction."""
    body = json.dumps(asdict(state) | {"format": FORMAT}, sort_keys=True)
    digest = hashlib.blake2b(body.encode(), digest_size=16).digest()
    connection.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?)", (body, digest))


def check_schema(connection: sqlite3.Connection) -> None:
    """Raise unless the tables are exactly ours."""
    found = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid")]
    if sorted(found) != sorted(SCHEMA):
        raise sqlite3.DatabaseError("its tables are not what was written")


def read_blocks(connection: sqlite3.Connection) -> list[Block]:
    """The digests of all blocks, in order."""
    return [Block(*found) for found in connection.execute("SELECT block, rows, digest FROM blocks ORDER BY block")]


def read_deaths(connection: sqlite3.Connection, after: int = -1) -> tuple[NDArray[np.int64], int]:
    """Rows that died in commits later than `after`, and their sum."""
    found = connection.execute("SELECT row, seq FROM deaths WHERE seq > ?", (after,)).fetchall()
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], dead_sum(pairs[:, 0], pairs[:, 1])


def read_items(connection: sqlite3.Connection, rows: list[int]) -> dict[int, Item]:
    """The items of these live rows, each checked against its digest; a missing one is damage."""
    found: dict[int, Item] = {}
    for start in range(0, len(rows), 500):
        part = rows[start : start + 500]
        marks = ",".join("?" * len(part))
        sql = f"SELECT row, id, document, metadata, digest FROM items WHERE row IN ({marks})"
        for item in connection.execute(sql, part):
            found[item[0]] = check_item(item)
    if len(found) != len(set(rows)):
        raise sqlite3.DatabaseError("items are missing")
    return found


def check_item(item: Item) -> Item:
    """The item, if it is what was written."""
    if item_digest(*item[:4]) != item[4]:
        raise sqlite3.DatabaseError(f"item {item[0]} is not what was written")
    return item


def verify_items(connection: sqlite3.Connection, live: NDArray[np.bool_]) -> None:
    """Read everything: SQLite's own structures and indexes, then every item against its digest and its place."""
    verdict = [text for (text,) in connection.execute("PRAGMA integrity_check(3)")]
    if verdict != ["ok"]:
        raise sqlite3.DatabaseError("; ".join(map(str, verdict)))
    count = 0
    for item in connection.execute("SELECT row, id, document, metadata, digest FROM items"):
        check_item(item)
        if not 0 <= item[0] < len(live) or not live[item[0]]:
            raise sqlite3.DatabaseError(f"item {item[0]} is dead or was never written")
        count += 1
    if count != int(live.sum()):
        raise sqlite3.DatabaseError(f"{int(live.sum())} items were committed and {count} are there")


def write_head(folder: Path, seq: int) -> None:
    """Note outside the catalogue how far it has committed: 8 bytes and their digest, in one write.

    Not fsynced and allowed to fail, because it only has to be true, not fresh: it never runs ahead of the catalogue.
    """
    data = seq.to_bytes(8, "little")
    data += hashlib.blake2b(data, digest_size=16).digest()
    with suppress(OSError):
        handle = os.open(folder / "head", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(handle, data, 0)
        finally:
            os.close(handle)


def read_head(folder: Path) -> int:
    """The last commit noted by `write_head`."""
    path = folder / "head"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}; {RECOVER}") from error
    if len(data) != 24 or hashlib.blake2b(data[:8], digest_size=16).digest() != data[8:]:
        raise DamagedError(f"{path}: not what was written; {RECOVER}")
    return int.from_bytes(data[:8], "little")


def check_head(head: int, state: State) -> None:
    """Raise when the catalogue is behind what was acknowledged."""
    if head > state.seq:
        raise sqlite3.DatabaseError(f"commit {head} was acknowledged and the catalogue stands at {state.seq}")
