"""The vectors file of one generation: raw little-endian unit rows, append-only, digested block by block.

Rows are float16 or float32. A number in float16 is off by at most 2^-11 of itself (2^-25 below 2^-14), so an inner
product with a unit query is off by less than 5e-4, and no unit row becomes zero: its largest number is at least
1/256 at the widest. What is handed out is float32 whatever the store.

Rows past the committed end are leftovers of a batch that was never acknowledged: readers do not map them, the next
writer cuts them off. What a block must hash to stands in the catalogue, in the transaction that committed its rows.
"""

import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import DamagedError, InputError
from matryo.core.prefix import inverse_norms
from matryo.core.records import check_vectors

Float32s = NDArray[np.float32]
Rows = NDArray[np.int64]

BLOCK_BYTES = 1 << 20
CHUNK_ROWS = 8192
FLOATS_AT_A_TIME = 1 << 15
"""Numbers converted at a time, so that the passes of `halves` stay in a cache."""
RECOVER = "restore the folder from a copy, or build the index again from its source"


STORES = {"float16": ("<f2", "f16"), "float32": ("<f4", "f32")}
"""How rows may lie on the disk: their type, and the ending of the file."""


def row_bytes(store: str, width: int) -> int:
    """Bytes of one row."""
    return np.dtype(STORES[store][0]).itemsize * width


def rows_per_block(store: str, width: int) -> int:
    """Rows of one digested block: about a mebibyte."""
    return max(1, BLOCK_BYTES // row_bytes(store, width))


def halves(codes: NDArray[np.float16]) -> Float32s:
    """float16 to float32 by moving bits, exact for finite numbers and many times quicker than a cast."""
    bits = codes.view(np.uint16).astype(np.uint32)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    bits &= np.uint32(0x7FFF)
    bits <<= np.uint32(13)
    bits |= sign
    numbers: Float32s = bits.view(np.float32)
    numbers *= np.float32(2.0**112)
    return numbers


def floats(stored: NDArray[Any]) -> Float32s:
    """Stored numbers as float32: float32 as they lie there, float16 copied."""
    if stored.dtype == np.float32:
        return stored
    if stored.size <= FLOATS_AT_A_TIME:
        return halves(np.ascontiguousarray(stored))
    out = np.empty(stored.shape, np.float32)
    step = max(1, FLOATS_AT_A_TIME // stored.shape[1])
    for start in range(0, len(out), step):
        out[start : start + step] = halves(np.ascontiguousarray(stored[start : start + step]))
    return out


def unit_chunks(vectors_ND: NDArray[Any]) -> Iterator[Float32s]:
    """Unit float32 rows, a chunk at a time, so that a batch larger than memory can come from a mapped file."""
    for start in range(0, len(vectors_ND), CHUNK_ROWS):
        part = np.asarray(vectors_ND[start : start + CHUNK_ROWS], dtype=np.float32)
        # Scaled in float64: one over the length of a tiny row does not fit a float32.
        yield (part * inverse_norms(part)[:, None]).astype("<f4")


def check_rows(vectors: object, width: int, name: str) -> Float32s:
    """(N, width) float32 from anything array-like; NaN, Inf, a zero row or another shape is an InputError naming it."""
    try:
        array = np.asarray(vectors)
    except ValueError as error:
        raise InputError(f"{name}: rows differ in length; give (N, {width}) numbers") from error
    if array.dtype.kind in "iu":
        array = array.astype(np.float32)
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] != width:
        raise InputError(f"{name}: expected (N, {width}) numbers, got shape {array.shape} of {array.dtype}")
    with np.errstate(over="ignore"):
        return check_vectors(array, name, width)


@dataclass(frozen=True)
class Block:
    """Digest of the first `rows` rows of a block."""

    number: int
    rows: int
    digest: bytes


class Vectors:
    """The committed rows of one generation, mapped read-only; every block is verified before its first use."""

    def __init__(self, path: Path, store: str, width: int, end: int, blocks: list[Block]) -> None:
        self.path, self.store, self.width, self.end, self.blocks = path, store, width, end, blocks
        self.block_rows = rows_per_block(store, width)
        expected = [(n, min(self.block_rows, end - n * self.block_rows)) for n in range(-(-end // self.block_rows))]
        if [(b.number, b.rows) for b in blocks] != expected:
            raise DamagedError(f"{path.parent / 'catalogue.sqlite'}: its list of vector blocks is damaged; {RECOVER}")
        kind = STORES[store][0]
        self._bytes = end * row_bytes(store, width)
        self._map: mmap.mmap | None = None
        self.stored: NDArray[Any] = np.empty((0, width), kind)
        """(end, D) rows as they lie on the disk, mapped; verify before reading."""
        with path.open("rb") as file:
            self._refuse_cut(os.fstat(file.fileno()).st_size)
            if end:
                self._map = mmap.mmap(file.fileno(), self._bytes, access=mmap.ACCESS_READ)
                self.stored = np.frombuffer(self._map, kind).reshape(end, width)
        self.verified = np.zeros(len(blocks), dtype=bool)
        self.all_verified = not blocks

    def trust(self, older: "Vectors") -> "Vectors":
        """Take over what an older view of the same file has verified; blocks that grew since are looked at again."""
        same = min(older.end // self.block_rows, len(self.blocks))
        if older.path == self.path:
            self.verified[:same] = older.verified[:same]
        return self

    def still_whole(self) -> None:
        """Raise DamagedError if the file was cut short since it was mapped.

        Reading past the end of a mapped file ends the process (SIGBUS). Asking for the size takes under a microsecond,
        so it is asked before every use; only a cut at the very moment of reading is left.
        """
        if self._map is not None:
            self._refuse_cut(self._map.size())

    def _refuse_cut(self, size: int) -> None:
        if size < self._bytes:
            raise DamagedError(f"{self.path}: {size} bytes, but {self._bytes} were committed; {RECOVER}")

    def ensure(self, rows: Rows) -> None:
        """Verify the blocks of these rows, or raise DamagedError."""
        self.still_whole()
        if self.all_verified:
            return
        numbers = rows // self.block_rows
        for number in np.unique(numbers[~self.verified[numbers]]):
            self._verify(int(number))
        self.all_verified = bool(self.verified.all())

    def ensure_all(self) -> None:
        """Verify every block not verified yet, or raise DamagedError."""
        self.still_whole()
        for number in np.flatnonzero(~self.verified):
            self._verify(int(number))
        self.all_verified = True

    def take(self, rows: Rows) -> Float32s:
        """(R, D) copies of verified rows."""
        return floats(self.take_stored(rows))

    def take_stored(self, rows: Rows) -> NDArray[Any]:
        """(R, D) copies of verified rows as they lie on the disk."""
        self.ensure(rows)
        # take is quicker than indexing, and lets other threads run meanwhile.
        taken: NDArray[Any] = self.stored.take(rows, axis=0)
        return taken

    def chunk(self, start: int, stop: int) -> Float32s:
        """Verified rows start:stop, not copied where the store is float32."""
        self.ensure(np.arange(start, stop, self.block_rows))
        self.ensure(np.array([stop - 1]))
        return floats(self.stored[start:stop])

    def _verify(self, number: int) -> None:
        block = self.blocks[number]
        first = number * self.block_rows
        part = np.ascontiguousarray(self.stored[first : first + block.rows])
        if hashlib.blake2b(part.data, digest_size=16).digest() != block.digest:
            raise DamagedError(
                f"{self.path}: rows {first}..{first + block.rows - 1} are not what was written; {RECOVER}"
            )
        self.verified[number] = True


@dataclass
class Appended:
    """What an append would change, once committed."""

    end: int
    blocks: list[Block]
    tail: Any


class Appender:
    """The writing end of a vectors file. `append` writes and fsyncs past the end; only `accept` moves the end."""

    def __init__(self, path: Path, store: str, width: int, end: int, last: Block | None, fresh: bool = False) -> None:
        self.path, self.end, self._kind = path, end, STORES[store][0]
        self.block_rows, self.row_bytes = rows_per_block(store, width), row_bytes(store, width)
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if fresh else 0)
        self._file = os.open(path, flags, 0o644)
        try:
            # The running hash of the tail block is of what was WRITTEN: rehashing the file at each append would
            # give damage a fresh digest.
            self._tail = hashlib.blake2b(digest_size=16)
            part = end % self.block_rows
            if part:
                self._tail.update(os.pread(self._file, part * self.row_bytes, (end - part) * self.row_bytes))
                if last is None or self._tail.digest() != last.digest:
                    raise DamagedError(f"{path}: its last block is not what was written; {RECOVER}")
            self.rollback()
        except BaseException:
            os.close(self._file)
            raise

    def append(self, chunks: Iterable[NDArray[Any]]) -> Appended:
        """Write chunks of unit rows past the end and fsync. Raises OSError; the committed rows are untouched."""
        end, tail, blocks = self.end, self._tail.copy(), []
        for chunk in chunks:
            data = np.ascontiguousarray(chunk, dtype=self._kind).view(np.uint8).reshape(-1).data
            self._write(data, end * self.row_bytes)
            done = 0
            while done < len(chunk):
                room = min(self.block_rows - end % self.block_rows, len(chunk) - done)
                tail.update(data[done * self.row_bytes : (done + room) * self.row_bytes])
                done, end = done + room, end + room
                if end % self.block_rows == 0:
                    blocks.append(Block(end // self.block_rows - 1, self.block_rows, tail.digest()))
                    tail = hashlib.blake2b(digest_size=16)
        if end % self.block_rows:
            blocks.append(Block(end // self.block_rows, end % self.block_rows, tail.digest()))
        os.fsync(self._file)
        return Appended(end, blocks, tail)

    def accept(self, appended: Appended) -> None:
        """The append is committed."""
        self.end, self._tail = appended.end, appended.tail

    def rollback(self) -> None:
        """Cut off what lies past the committed end. Best effort: nobody ever reads those bytes."""
        with suppress(OSError):
            if os.fstat(self._file).st_size > self.end * self.row_bytes:
                os.ftruncate(self._file, self.end * self.row_bytes)

    def close(self) -> None:
        """Close the file; harmless twice."""
        file, self._file = self._file, -1
        if file >= 0:
            with suppress(OSError):  # what mattered was fsynced
                os.close(file)

    def _write(self, data: memoryview, at: int) -> None:
        while len(data):
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written
