"""Codes and what is built of them, one per width and name, derived from the vectors and cached in files that may be
thrown away.

A name is a code (`int8`: a column whose rows can be scored one by one) or a code and a scan (`pq32 flat`,
`int8 hnsw(M=32)`: what a first stage builds).
"""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from matryo.core.errors import StorageError
from matryo.core.files import digest, write_atomically
from matryo.core.plan import Stage
from matryo.index.column import Column, Float32s, Rows
from matryo.index.scans.bounds import NAME as BOUNDS
from matryo.index.scans.bounds import Bounds, exact_rows
from matryo.index.scans.cells import Cells
from matryo.index.scans.common import Allowed, Scored
from matryo.index.scans.flat import scan_column
from matryo.index.scans.graph import Graph
from matryo.index.scans.scanner import Scanner, Sealed, sealed_name, stage_of
from matryo.index.trained import faiss_module
from matryo.index.vectors import Vectors

Manifest = dict[str, tuple[int, str, int]]
"""file name -> (size, digest, rows covered)"""
ManifestRow = tuple[str, int, str, int]
BOUNDS_FROM, BOUNDS_WIDTH = 1 << 23, 32
"""Numbers in the index, and its width, from which on exact search goes by bounds; smaller ones are scored whole."""
IN_PLACE = ("float32", "float16", "bfloat16", "int8", "binary")
"""Codes whose flat scan reads the column itself; the others are packed for it."""


def by_bounds(width: int, items: int) -> bool:
    """Whether exact search of so many items goes by bounds."""
    return width >= BOUNDS_WIDTH and items * width >= BOUNDS_FROM


@lru_cache(maxsize=1024)
def held_as(stage: Stage, first: bool) -> str:
    """The name of what a stage needs: a first stage scans, a later one scores rows."""
    return stage.code if not first or (stage.scan == "flat" and stage.code in IN_PLACE) else sealed_name(stage)


class CodeStore:
    """Columns and scanners of one generation. Safe to use from several threads."""

    def __init__(self, folder: Path, generation: int, manifest: Manifest) -> None:
        self.folder, self.generation, self.manifest = folder, generation, manifest
        self._columns: dict[tuple[int, str], Column] = {}
        self._scanners: dict[tuple[int, str], Scanner] = {}
        self._lock = threading.Lock()

    def scan(
        self, stage: Stage, queries_QD: Float32s, n: int, vectors: Vectors, allowed: Allowed | None
    ) -> list[Scored]:
        """The n best rows of `vectors` for each query by this stage's code and scan, ascending, with their scores."""
        name = held_as(stage, first=True)
        if name == stage.code:
            column = self.column(stage.width, name, vectors)
            return scan_column(column, queries_QD, n, vectors.end, allowed)
        return self.scanner(stage.width, name).scan(stage, queries_QD, n, vectors, vectors.end, allowed)

    def exact_rows(
        self, query_D: Float32s, n: int, vectors: Vectors, allowed: Allowed | None, exact: Callable[[Rows], Float32s]
    ) -> Rows | None:
        """Every row that may be one of the n best of the full width, or None where scoring all is as quick."""
        derived = (vectors.width, BOUNDS) in self._columns
        if n * 64 > vectors.end or not (derived or by_bounds(vectors.width, vectors.end)):
            return None
        return exact_rows(self.column(vectors.width, BOUNDS, vectors), query_D, n, vectors.end, allowed, exact)

    def column(self, width: int, name: str, vectors: Vectors) -> Column:
        """A column that covers all rows of `vectors`: from memory, else from its file, else encoded anew."""
        key = (width, name)
        have = self._columns.get(key)
        if have is not None and have.rows >= vectors.end:
            return have
        with self._lock:
            column = self._columns.get(key) or self._column_file(width, name, vectors.end) or new_column(name, width)
            column.extend(vectors, vectors.end)
            if column.stale:
                column = new_column(name, width)
                column.extend(vectors, vectors.end)
            self._columns[key] = column
            return column

    def scanner(self, width: int, name: str) -> Scanner:
        """A scanner: from memory, else from its file, else one that builds at its first scan."""
        key = (width, name)
        have = self._scanners.get(key)
        if have is None:
            with self._lock:
                have = self._scanners.get(key)
                if have is None:
                    stage = stage_of(width, name)
                    have = self._scanners[key] = Scanner(stage, self._sealed_file(stage, name))
        return have

    def file_name(self, width: int, name: str) -> str:
        """Name of a cache file; the generation in it keeps renumbered rows apart."""
        if " " not in name:
            return f"{self.generation}-{width}-{name}.safetensors"
        plain = name.replace(" ", "-").replace("(", "-").replace(")", "").replace("=", "").replace(",", "-")
        return f"{self.generation}-{width}-{plain}.faiss"

    def _verified(self, width: int, name: str) -> tuple[Path, int] | None:
        """A cache file that is what was written and the rows it covers, else None."""
        noted = self.manifest.get(self.file_name(width, name))
        path = self.folder / self.file_name(width, name)
        try:
            whole = noted is not None and path.stat().st_size == noted[0] and digest(path) == noted[1]
        except OSError:
            return None
        return (path, noted[2]) if noted is not None and whole else None

    def _column_file(self, width: int, name: str, end: int) -> Column | None:
        """The column from its file; None where there is none, or it is damaged, for it can always be encoded anew."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        found = self._verified(width, name)
        if found is None or found[1] > end:
            return None
        try:
            return new_column(name, width).load(load(found[0].read_bytes()), found[1])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def _sealed_file(self, stage: Stage, name: str) -> Sealed | None:
        found = self._verified(stage.width, name)
        if found is None:
            return None
        faiss = faiss_module()
        kind = Graph if stage.scan == "hnsw" else Cells
        try:
            index = faiss.read_index(str(found[0]), faiss.IO_FLAG_MMAP_IFC if kind is Graph else 0)
            return kind(stage, index) if (index.ntotal, index.d) == (found[1], stage.width) else None
        except RuntimeError:  # faiss' only exception
            return None

    def prepare(self, width: int, name: str, vectors: Vectors) -> None:
        """Derive a column or what a scanner builds of all rows; searches go on meanwhile."""
        if " " in name:
            self.scanner(width, name).prepare(vectors, vectors.end)
        else:
            self.column(width, name, vectors)

    def abandon(self) -> None:
        """End what is being built aside."""
        for scanner in list(self._scanners.values()):
            scanner.abandon()

    def loaded(self) -> dict[tuple[int, str], Column | Scanner]:
        """What is in memory."""
        return {**self._columns, **self._scanners}

    def save(self, width: int, name: str, vectors: Vectors) -> ManifestRow | None:
        """Write a cache file unless a recent one is there; the manifest row to commit. Raises StorageError."""
        from safetensors.numpy import save

        file = self.file_name(width, name)
        if " " in name:
            scanner = self.scanner(width, name)
            scanner.prepare(vectors, vectors.end)
            sealed = scanner.sealed
            if sealed is None or self._recent(file, sealed.rows, 0):
                return None
            index = sealed.index
            return self._write(file, sealed.rows, lambda path: faiss_module().write_index(index, str(path)))
        column = self.column(width, name, vectors)
        if not column.rows or self._recent(file, column.rows, 10):
            return None
        # Written here and not by safetensors, whose files only their owner may read.
        data = save(column.arrays())
        return self._write(file, column.rows, lambda path: _write(path, data))

    def _recent(self, file: str, rows: int, share: int) -> bool:
        """Whether a file is there that lacks at most one row in `share` (none where share is 0)."""
        noted = self.manifest.get(file)
        lacking = 0 if noted is None else rows - noted[2]
        return noted is not None and (self.folder / file).exists() and lacking <= (noted[2] // share if share else 0)

    def _write(self, file: str, rows: int, write: Callable[[Path], None]) -> ManifestRow:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / file
        try:
            write_atomically(path, write)
        except RuntimeError as error:  # faiss says a full disk so
            raise StorageError(
                f"writing {path}: {str(error).splitlines()[-1]}; it is derived, nothing is lost"
            ) from error
        row = (file, path.stat().st_size, digest(path), rows)
        self.manifest[file] = row[1:]
        return row


def new_column(name: str, width: int) -> Column:
    """An empty column: of a code, or of the bounds that exact search goes by."""
    return Column(name, width, codec=Bounds(width)) if name == BOUNDS else Column(name, width)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
