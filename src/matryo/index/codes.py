"""Codes in memory, one column per (width, code), derived from the vectors and cached in files that may be thrown away.

A column grows as rows are appended. Its codec was fitted on the prefixes of the stored vectors; when the rows have
doubled since, a codec that learns a scale is fitted again.
"""

import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.codecs import Binary, Codec, Float16, Int8, codec
from matryo.core.files import digest, write_atomically
from matryo.core.prefix import truncate
from matryo.index.vectors import CHUNK_ROWS, Vectors, halves

Float32s = NDArray[np.float32]
Rows = NDArray[np.int64]
Part = NDArray[Any]

FIT_ROWS = 65536
SCAN_ELEMENTS = 1 << 20
"""Numbers decoded at a time: 4 MB of float32, so that the product after the decoding reads a cache."""
HAMMING_BYTES = (64, 32, 16, 8)
"""Code lengths faiss has unrolled Hamming loops for. A wider code is a sum over pieces of these lengths."""

Manifest = dict[str, tuple[int, str, int]]
"""file name -> (size, digest, rows covered)"""


class Column:
    """The codes of the first `rows` rows at one width, as arrays that only grow.

    Binary codes lie in pieces of 64, 32, 16 or 8 bytes a row, each its own contiguous array, zero bits at the end.
    """

    def __init__(self, name: str, width: int) -> None:
        self.codec: Codec = codec(name, width)
        self.width, self.rows, self.fitted = width, 0, 0
        self.parts: list[Part] = []
        if name == "binary":
            left, self.pieces = -(-width // 64) * 8, []
            while left:
                self.pieces.append(next(size for size in HAMMING_BYTES if size <= left))
                left -= self.pieces[-1]

    def extend(self, vectors: Vectors, end: int) -> None:
        """Encode rows up to `end` from verified vectors. Arrays already handed out keep their content."""
        if end <= self.rows:
            return
        if not self.fitted:
            step = max(1, end // FIT_ROWS)
            self.codec.fit(truncate(vectors.take(np.arange(0, end, step))[:, : self.width], self.width))
            self.fitted = end
        for start in range(self.rows, end, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, end)
            prefixes = truncate(vectors.chunk(start, stop)[:, : self.width], self.width)
            self._put(start, end, self._split(self.codec.encode(prefixes)))
        self.rows = end

    def _split(self, codes: Part) -> list[Part]:
        if not isinstance(self.codec, Binary):
            return [codes]
        if self.pieces == [codes.shape[1]]:
            return [codes]
        padded = np.pad(codes, ((0, 0), (0, sum(self.pieces) - codes.shape[1])))
        return np.split(padded, np.cumsum(self.pieces)[:-1], axis=1)

    def _put(self, at: int, end: int, codes: list[Part]) -> None:
        if not self.parts or len(self.parts[0]) < end:
            # Exactly what is needed at first, an eighth of room once it grows.
            room = end if not self.rows else end + end // 8
            grown = [np.empty((room, *part.shape[1:]), part.dtype) for part in codes]
            for new, old in zip(grown, self.parts, strict=False):
                new[:at] = old[:at]
            self.parts = grown
        for into, part in zip(self.parts, codes, strict=True):
            into[at : at + len(part)] = part

    @property
    def stale(self) -> bool:
        """Whether the scale was learnt from fewer than half of the rows."""
        return self.rows > 2 * self.fitted and bool(self.codec.state)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.nbytes for part in self.parts)

    def costs(self, queries_QD: Float32s, end: int) -> NDArray[Any]:
        """(Q, end) costs of every row, lower is better: Hamming distances (int32) or minus inner products (float32)."""
        parts = self.parts
        if isinstance(self.codec, Binary):
            codes = self._split(self.codec.encode(np.ascontiguousarray(queries_QD[:, : self.width])))
            total = hamming(codes[0], parts[0], end)
            for mine, theirs in zip(codes[1:], parts[1:], strict=True):
                total += hamming(mine, theirs, end)
            return total
        queries = -queries_QD[:, : self.width]
        if isinstance(self.codec, Int8):
            queries = queries * self.codec.state["scale"]
        out = np.empty((len(queries), end), np.float32)
        step = max(1, SCAN_ELEMENTS // self.width)
        for start in range(0, end, step):
            stop = min(start + step, end)
            products(queries, self._numbers(parts[0][start:stop]), out[:, start:stop])
        return out

    def scores(self, query_D: Float32s, rows: Rows) -> Float32s:
        """(R,) inner products of the float query with the decoded codes of these rows."""
        parts = [part[rows] for part in self.parts]
        codes = np.concatenate(parts, axis=1)[:, : self.width // 8] if isinstance(self.codec, Binary) else parts[0]
        decoded: Float32s = self.codec.decode(codes) @ query_D[: self.width]
        return decoded

    def _numbers(self, codes: Part) -> Float32s:
        """Codes as float32, int8 without its scale (which the query carries)."""
        if isinstance(self.codec, Int8):
            return codes.astype(np.float32)
        return halves(codes) if isinstance(self.codec, Float16) else self.codec.decode(codes)

    def arrays(self) -> dict[str, Part]:
        """Everything worth caching, for a safetensors file."""
        codes = {f"part{n}": part[: self.rows] for n, part in enumerate(self.parts)}
        state = {f"state.{name}": value for name, value in self.codec.state.items()}
        return {**codes, **state, "fitted": np.array([self.fitted], np.int64)}

    def load(self, arrays: dict[str, Part], rows: int) -> "Column":
        """Take over what `arrays` gave."""
        self.parts = [arrays[f"part{n}"] for n in range(sum(name.startswith("part") for name in arrays))]
        self.codec.load({name[6:]: value for name, value in arrays.items() if name.startswith("state.")})
        self.rows, self.fitted = rows, int(arrays["fitted"][0])
        return self


class CodeStore:
    """The columns of one generation. Safe to use from several threads."""

    def __init__(self, folder: Path, generation: int, manifest: Manifest) -> None:
        self.folder, self.generation, self.manifest = folder, generation, manifest
        self._columns: dict[tuple[int, str], Column] = {}
        self._lock = threading.Lock()

    def column(self, width: int, name: str, vectors: Vectors) -> Column:
        """A column that covers all rows of `vectors`: from memory, else from its file, else encoded anew."""
        key = (width, name)
        have = self._columns.get(key)
        if have is not None and have.rows >= vectors.end:
            return have
        with self._lock:
            column = self._columns.get(key) or self._cached(width, name, vectors.end) or Column(name, width)
            column.extend(vectors, vectors.end)
            if column.stale:
                column = Column(name, width)
                column.extend(vectors, vectors.end)
            self._columns[key] = column
            return column

    def file_name(self, width: int, name: str) -> str:
        """Name of a column's cache file; the generation in it keeps renumbered rows apart."""
        return f"{self.generation}-{width}-{name}.safetensors"

    def _cached(self, width: int, name: str, end: int) -> Column | None:
        """The column from its file; None where there is none, or it is damaged, for it can always be encoded anew."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        noted = self.manifest.get(self.file_name(width, name))
        path = self.folder / self.file_name(width, name)
        try:
            if noted is None or noted[2] > end or path.stat().st_size != noted[0] or digest(path) != noted[1]:
                return None
            return Column(name, width).load(load(path.read_bytes()), noted[2])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def loaded(self) -> dict[tuple[int, str], Column]:
        """The columns in memory."""
        return dict(self._columns)

    def save(self, width: int, name: str, vectors: Vectors) -> tuple[str, int, str, int] | None:
        """Write a column's file unless a recent one is there; the manifest row to commit. Raises StorageError."""
        from safetensors.numpy import save

        file = self.file_name(width, name)
        column = self.column(width, name, vectors)
        noted = self.manifest.get(file)
        fresh = noted is not None and (self.folder / file).exists() and column.rows - noted[2] <= noted[2] // 10
        if fresh or not column.rows:
            return None
        self.folder.mkdir(exist_ok=True)
        # Written here and not by safetensors, whose files only their owner may read.
        write_atomically(self.folder / file, lambda temporary: _write(temporary, save(column.arrays())))
        row = (file, (self.folder / file).stat().st_size, digest(self.folder / file), column.rows)
        self.manifest[file] = row[1:]
        return row


def hamming(queries: Part, codes: Part, end: int) -> NDArray[np.int32]:
    """(Q, end) Hamming distances of 8, 16, 32 or 64 byte codes."""
    faiss = importlib.import_module("faiss")
    queries = np.ascontiguousarray(queries)
    out = np.empty((len(queries), end), np.int32)
    if end and len(queries):
        swig = faiss.swig_ptr
        faiss.hammings(swig(queries), swig(codes), len(queries), end, codes.shape[1], swig(out))
    return out


def products(queries_QD: Float32s, rows_ND: Float32s, out_QN: Float32s) -> None:
    """out = queries . rows^T; one query goes through the matrix-vector product, which reads each row once."""
    if len(queries_QD) == 1:
        np.dot(rows_ND, queries_QD[0], out=out_QN[0])
    else:
        out_QN[:] = queries_QD @ rows_ND.T


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
