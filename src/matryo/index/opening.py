"""What must hold before an index is made or opened: the path, the lock, the model, the first snapshot."""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import DamagedError, InputError, LockedError
from matryo.core.files import storage_errors
from matryo.core.plan import Plan
from matryo.core.prefix import inverse_norms
from matryo.index import catalogue as cat
from matryo.index.funnel import Float32s, check_plan
from matryo.index.snapshot import Snapshot, load_snapshot, vectors_path
from matryo.index.vectors import RECOVER, STORES, check_rows, unit_chunks


class Lock:
    """The writer's lock on a folder: held by an open file, so that it ends with the process however that ends."""

    def __init__(self, folder: Path) -> None:
        import fcntl

        with storage_errors(f"opening {folder} for writing (read_only=True needs no lock)"):
            self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise LockedError(
                f"{folder} is open for writing elsewhere; close that one first, or open this one with read_only=True"
            ) from error

    def release(self) -> None:
        """Give the lock up; harmless twice."""
        file, self._file = self._file, -1
        if file >= 0:
            with suppress(OSError):
                os.close(file)


def folder_of(path: str | Path) -> Path:
    """The index's folder as an absolute path, so that a later chdir changes nothing."""
    if "://" in str(path):
        raise InputError(f"{str(path).split('://')[0]}:// is not an engine of this release; give the path of a folder")
    return Path(path).absolute()


def refuse_taken(folder: Path) -> None:
    """Raise unless a new index may be made here."""
    if (folder / cat.NAME).exists():
        raise InputError(f"{folder} already holds an index; open it with Index.open, or choose another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder; choose another")


def checked_plan(plan: str | Plan, width: int) -> Plan:
    """A plan, from its text or itself, that this index can run on vectors of `width` dimensions."""
    return _checked_plan(plan, width) if isinstance(plan, str | Plan) else check_plan(Plan.parse(plan), width)


@lru_cache(maxsize=256)
def _checked_plan(plan: str | Plan, width: int) -> Plan:
    """Parsed and checked once: a search asks by the same few plans again and again."""
    return check_plan(Plan.parse(plan) if isinstance(plan, str) else plan, width)


def check_store(store: object) -> str:
    """How vectors are to lie on the disk."""
    if store not in STORES:
        raise InputError(f"store must be {' or '.join(map(repr, STORES))}, got {store!r}")
    return str(store)


def check_model(model: object) -> dict[str, Any] | None:
    """The model note as plain JSON."""
    if model is None:
        return None
    if not isinstance(model, dict):
        raise InputError(f"model must be a dict such as {{'name': ..., 'digest': ...}}, got {type(model).__name__}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(model, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"model must be JSON: {error}") from error
    return plain


def insist_on_model(stored: dict[str, Any] | None, wanted: object, folder: object) -> None:
    """Raise unless every entry of `wanted` was noted when the index was made."""
    expected = check_model(wanted)
    for name, value in (expected or {}).items():
        if stored is None or stored.get(name) != value:
            noted = "nothing" if stored is None or name not in stored else repr(stored[name])
            raise InputError(
                f"{folder} was made for another model: its {name} is {noted}, expected {value!r}; "
                "search it with the model that made it, or build a new index"
            )


def check_k(k: object) -> int:
    """How many answers, as an int."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"k must be an integer of at least 1, got {k!r}")
    return int(k)


def unit_queries(queries: object, width: int) -> Float32s:
    """(Q, width) unit rows from (Q, width) or (width,) numbers."""
    array: NDArray[Any]
    try:
        array = np.asarray(queries)
    except ValueError as error:
        raise InputError(f"queries: rows differ in length; give (Q, {width}) numbers") from error
    if array.dtype == np.float32 and array.shape in ((width,), (1, width)):
        # One query: its length tells in one pass whether it is finite and not zero.
        row = array.reshape(1, width)
        inverse = inverse_norms(row)
        if inverse[0] > 0:
            return (row * inverse[:, None]).astype("<f4")
    rows = check_rows(array[None, :] if array.ndim == 1 else array, width, "queries")
    return (
        np.concatenate([np.empty((0, width), np.float32), *unit_chunks(rows)])
        if len(rows) != 1
        else next(unit_chunks(rows))
    )


@contextmanager
def whole_reading(folder: Path, catalogue: cat.Catalogue) -> Iterator[tuple[sqlite3.Connection, Snapshot]]:
    """A read transaction and a snapshot read anew in it; an index that lost what it had acknowledged is refused."""
    for _ in range(100):
        # Read before the transaction begins: the head never runs ahead of the catalogue, a later one might.
        head = cat.read_head(folder)
        with catalogue.reading() as connection:
            state = cat.parse_state(*cat.read_body(connection))
            cat.check_schema(connection)
            cat.check_head(head, state)
            try:
                snapshot = load_snapshot(folder, connection, state)
            except FileNotFoundError:
                continue  # compacted away since the transaction began
            yield connection, snapshot
            return
    raise DamagedError(f"{vectors_path(folder, state.generation, state.store)} is gone; {RECOVER}")
