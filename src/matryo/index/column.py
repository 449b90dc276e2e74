"""A column: the codes of one width in memory, as arrays that only grow, and the score of any row in them.

Its codec was fitted on the prefixes of the stored vectors; when the rows have doubled since, a codec that learns a
scale is fitted again.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from matryo.core.codecs import Binary, Codec, Float16, Int8
from matryo.core.prefix import truncate
from matryo.index.trained import faiss_module, index_codec
from matryo.index.vectors import CHUNK_ROWS, halves

Float32s = NDArray[np.float32]
Rows = NDArray[np.int64]
Part = NDArray[Any]

FIT_ROWS = 65536
SCAN_ELEMENTS = 1 << 20
"""Numbers decoded at a time: 4 MB of float32, so that the product after the decoding reads a cache."""
HAMMING_BYTES = (64, 32, 16, 8)
"""Code lengths faiss has unrolled Hamming loops for. A wider code is a sum over pieces of these lengths."""
SIGN = np.uint8(0x80)


class Stored(Protocol):
    """Rows to encode: `Vectors`, or anything like it."""

    def take(self, rows: Rows) -> Float32s:
        """(R, D) unit rows."""

    def chunk(self, start: int, stop: int) -> Float32s:
        """Unit rows start:stop."""


class Column:
    """The codes of rows first:first+rows at one width, as arrays that only grow.

    Binary codes lie in pieces of 64, 32, 16 or 8 bytes a row, each its own contiguous array, zero bits at the end.
    int8 codes lie as unsigned bytes, 128 above their value, as faiss wants them.
    """

    def __init__(self, name: str, width: int, first: int = 0, codec: Codec | None = None) -> None:
        self.codec: Codec = codec or index_codec(name, width)
        self.name, self.width, self.first, self.rows = name, width, first, 0
        self.fitted = first if codec else 0
        self.parts: list[Part] = []
        self.view: tuple[Part, int, Any] | None = None
        """faiss' index over the array, and the rows it covers."""
        if name == "binary":
            left, self.pieces = -(-width // 64) * 8, []
            while left:
                self.pieces.append(next(size for size in HAMMING_BYTES if size <= left))
                left -= self.pieces[-1]

    @property
    def end(self) -> int:
        """One past the last row."""
        return self.first + self.rows

    def extend(self, vectors: Stored, end: int) -> None:
        """Encode rows up to `end` from verified vectors. Arrays already handed out keep their content."""
        if end <= self.end:
            return
        if not self.fitted:
            self.codec.fit(sample(vectors, self.width, end))
            self.fitted = end
        for start in range(self.end, end, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, end)
            prefixes = truncate(vectors.chunk(start, stop)[:, : self.width], self.width)
            self._put(start - self.first, end - self.first, self._split(self.codec.encode(prefixes)))
        self.rows = end - self.first

    def repeated(self, count: int) -> Self:
        """A column of `count` rows, these again and again: what a scan of so many would cost can be timed on it."""
        larger = copy(self)
        larger.parts = [np.resize(part[: self.rows], (count, *part.shape[1:])) for part in self.parts]
        larger.rows, larger.view = count, None
        return larger

    def _split(self, codes: Part) -> list[Part]:
        if codes.dtype == np.int8:
            return [codes.view(np.uint8) ^ SIGN]
        if not isinstance(self.codec, Binary) or self.pieces == [codes.shape[1]]:
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

    def costs(self, queries_QD: Float32s, hamming_of_bits: bool = True) -> Callable[[int, int], NDArray[Any]]:
        """What gives (Q, R) costs of the column's rows start:stop, lower is better: minus products (float32); of bits
        Hamming distances (int32), unless the float query is to meet the bits.
        """
        if isinstance(self.codec, Binary) and hamming_of_bits:
            return partial(self.distances, self.coded(queries_QD))
        queries = -queries_QD[:, : self.width]
        if isinstance(self.codec, Int8):
            queries = queries * self.codec.state["scale"]
        return partial(self._costs, queries)

    def _costs(self, queries: Float32s, start: int, stop: int) -> Float32s:
        out = np.empty((len(queries), stop - start), np.float32)
        step = max(1, SCAN_ELEMENTS // self.width)
        for low in range(start, stop, step):
            high = min(low + step, stop)
            products(
                queries, self._numbers([part[low:high] for part in self.parts]), out[:, low - start : high - start]
            )
        return out

    def coded(self, queries_QD: Float32s) -> list[Part]:
        """Queries as this column's rows lie: pieces of codes."""
        return self._split(self.codec.encode(np.ascontiguousarray(queries_QD[:, : self.width])))

    def distances(self, coded: list[Part], start: int, stop: int) -> NDArray[np.int32]:
        """(Q, stop - start) Hamming distances of coded queries to the column's rows start:stop."""
        total = hamming(coded[0], self.parts[0][start:stop], stop - start)
        for mine, theirs in zip(coded[1:], self.parts[1:], strict=True):
            total += hamming(mine, theirs[start:stop], stop - start)
        return total

    def scores(self, query_D: Float32s, rows: Rows) -> Float32s:
        """(R,) inner products of the float query with the decoded codes of these rows."""
        codes = self._whole([part[rows - self.first] for part in self.parts])
        if isinstance(self.codec, Int8):
            codes = (codes ^ SIGN).view(np.int8)
        decoded: Float32s = self.codec.decode(codes) @ query_D[: self.width]
        return decoded

    def _whole(self, parts: list[Part]) -> Part:
        """The pieces of a code side by side, without padding."""
        return np.concatenate(parts, axis=1)[:, : self.width // 8] if isinstance(self.codec, Binary) else parts[0]

    def _numbers(self, parts: list[Part]) -> Float32s:
        """Codes as float32, int8 without its scale (which the query carries)."""
        codes = self._whole(parts)
        if isinstance(self.codec, Int8):
            return codes.astype(np.float32) - np.float32(128)
        return halves(codes) if isinstance(self.codec, Float16) else self.codec.decode(codes)

    def arrays(self) -> dict[str, Part]:
        """Everything worth caching, for a safetensors file."""
        codes = {f"codes{n}": part[: self.rows] for n, part in enumerate(self.parts)}
        state = {f"state.{name}": value for name, value in self.codec.state.items()}
        return {**codes, **state, "fitted": np.array([self.fitted], np.int64)}

    def load(self, arrays: dict[str, Part], rows: int) -> "Column":
        """Take over what `arrays` gave. Raises KeyError when that was not a column."""
        names = sorted(name for name in arrays if name.startswith("codes"))
        self.parts = [arrays[f"codes{n}"] for n in range(max(1, len(names)))]
        self.codec.load({name[6:]: value for name, value in arrays.items() if name.startswith("state.")})
        self.rows, self.fitted = rows, int(arrays["fitted"][0])
        return self


def sample(vectors: Stored, width: int, end: int) -> Float32s:
    """Unit prefixes of evenly spaced rows, at most twice FIT_ROWS, to fit a codec on."""
    step = max(1, end // FIT_ROWS)
    return truncate(vectors.take(np.arange(0, end, step))[:, :width], width)


def hamming(queries: Part, codes: Part, end: int) -> NDArray[np.int32]:
    """(Q, end) Hamming distances of 8, 16, 32 or 64 byte codes."""
    faiss = faiss_module()
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
