"""Vectors read a part at a time from files that need not fit in memory, and a fingerprint that tells files apart."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.records import check_vectors, insist_on_file

SAMPLES = 256
SAMPLE_BYTES = 1 << 16
PARQUET_ROWS = 8192


@dataclass(frozen=True)
class VectorStream:
    """(rows, width) numbers in a file. `parts(size, start)` gives (size, width) float32 parts, the last one shorter."""

    path: Path
    rows: int
    width: int
    read: Callable[[int, int], Iterator[NDArray[Any]]]
    """Numbers from a row on, in parts of about so many rows."""

    def parts(self, size: int, start: int = 0) -> Iterator[NDArray[np.float32]]:
        """Rows from `start` on, refused where they hold NaN, Inf or only zeros; the row is named."""
        held: list[NDArray[Any]] = []
        count = 0
        for part in self.read(size, start):
            held.append(part)
            count += len(part)
            while count >= size:
                whole = np.concatenate(held) if len(held) > 1 else held[0]
                yield check_vectors(whole[:size], str(self.path), self.width, start)
                start, count, held = start + size, count - size, [whole[size:]] if count > size else []
        if count:
            yield check_vectors(np.concatenate(held), str(self.path), self.width, start)


def open_vectors(path: str | Path) -> VectorStream:
    """Vectors in `.npy`, `.safetensors` (its only tensor) or Parquet (column `vector`); nothing is read but the head.

    Raises:
        InputError: no such file, another kind, not (N, D) floating point. MissingExtraError: Parquet without pyarrow.
    """
    path = Path(path)
    insist_on_file(path)
    kinds = {".npy": _npy, ".safetensors": _safetensors, ".parquet": _parquet}
    if path.suffix not in kinds:
        raise InputError(f"{path}: unknown kind of vectors; use .npy, .safetensors or .parquet")
    try:
        return kinds[path.suffix](path)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a readable file of vectors ({error})") from error


def fingerprint(path: str | Path) -> str:
    """BLAKE2b-128 of a file's size and of up to 256 evenly spaced pieces of 64 KiB: whole up to 16 MiB.

    Quick on files of any size. It tells apart files of different length or content, though not two large ones of one
    length that differ only between the pieces.
    """
    path = Path(path)
    insist_on_file(path)
    size = path.stat().st_size
    last = max(0, size - SAMPLE_BYTES)
    starts = sorted({last * n // (SAMPLES - 1) for n in range(SAMPLES)})
    if size <= SAMPLES * SAMPLE_BYTES:
        starts = list(range(0, size, SAMPLE_BYTES))
    made = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with path.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            made.update(stream.read(SAMPLE_BYTES))
    return made.hexdigest()


def _shaped(path: Path, shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    if len(shape) != 2 or np.dtype(kind).kind != "f" or not shape[1]:
        raise InputError(f"{path}: expected (N, D) floating point, got shape {tuple(shape)} of {kind}")
    if not shape[0]:
        raise InputError(f"{path}: no rows")
    return shape[0], shape[1]


def _npy(path: Path) -> VectorStream:
    array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    rows, width = _shaped(path, array.shape, str(array.dtype))
    kind, offset, plain = array.dtype, array.offset, array.flags.c_contiguous

    def read(size: int, start: int) -> Iterator[NDArray[Any]]:
        for at in range(start, rows, size):
            count = min(size, rows - at)
            if plain:  # read, not mapped: pages once read need not stay
                part = np.fromfile(path, kind, count * width, offset=offset + at * width * kind.itemsize)
                yield part.reshape(count, width)
            else:
                yield np.asarray(array[at : at + count])

    return VectorStream(path, rows, width, read)


def _safetensors(path: Path) -> VectorStream:
    from safetensors import SafetensorError, safe_open

    kinds = {"F16": "float16", "F32": "float32", "F64": "float64"}
    try:
        opened: Any = safe_open(path, "numpy")
        names = sorted(opened.keys())
        if len(names) != 1:
            raise InputError(f"{path}: expected one tensor, it holds {names}")
        tensor = opened.get_slice(names[0])
        kind = tensor.get_dtype()
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable file of vectors ({error})") from error
    if kind not in kinds:
        raise InputError(f"{path}: expected (N, D) floating point ({', '.join(kinds)}), got {kind}")
    rows, width = _shaped(path, tuple(tensor.get_shape()), kinds[kind])

    def read(size: int, start: int) -> Iterator[NDArray[Any]]:
        for at in range(start, rows, size):
            yield tensor[at : min(at + size, rows)]

    return VectorStream(path, rows, width, read)


def _parquet(path: Path) -> VectorStream:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "reading Parquet") from error

    def read(size: int, start: int) -> Iterator[NDArray[Any]]:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups, skip = list(range(file.num_row_groups)), start
            while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
                skip -= file.metadata.row_group(groups.pop(0)).num_rows
            at = start - skip
            for batch in file.iter_batches(min(size, PARQUET_ROWS), row_groups=groups, columns=["vector"]):
                part = _matrix(path, batch.column(0), at)
                at += len(part)
                if skip < len(part):
                    yield part[skip:]
                skip = max(0, skip - len(part))

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "vector" not in names:
                raise InputError(f"{path}: no column 'vector'; it has {', '.join(map(repr, names))}")
            kind = file.schema_arrow.field("vector").type
            rows = file.metadata.num_rows
        types = pyarrow.types
        nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if not nested or not types.is_floating(kind.value_type):
            raise InputError(f"{path}: column 'vector' must be lists of floating point numbers, it is {kind}")
        first = next(read(1, 0), np.empty((0, 1), np.float32))
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error
    return VectorStream(path, *_shaped(path, (rows, first.shape[1]), str(first.dtype)), read)


def _matrix(path: Path, column: Any, first: int) -> NDArray[Any]:
    """(N, D) numbers of a column of lists, which must be equally long and without nulls."""
    import pyarrow.compute

    lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero((lengths != lengths[0]) | (lengths < 1))
    flat = column.flatten()
    if not len(bad) and flat.null_count:
        bad = np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False)) // lengths[0]
    if len(bad):
        length = lengths[bad[0]]
        what = "nothing" if length < 0 else f"{length} of them" if not flat.null_count else "a null among them"
        line = first + 1 + int(bad[0])
        raise InputError(f"{path} line {line}: 'vector' must be a list of as many numbers in every row, got {what}")
    numbers: NDArray[Any] = flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return numbers
