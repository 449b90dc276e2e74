"""How a corpus is cut into parts: whole row groups of one file, in order. A part's file name follows from the input."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matryo.bulk.options import Bulk
from matryo.core.errors import InputError, MissingExtraError
from matryo.core.records import insist_on_file
from matryo.core.streams import fingerprint


@dataclass(frozen=True)
class Part:
    """Some row groups of one file, which become one file of vectors."""

    name: str
    """`part-FFFFF-GGGGG.parquet`: number of the file among the sorted inputs, first row group. Sorts as they do."""
    path: str
    groups: tuple[int, int]
    """First row group, and the one after the last."""
    start: int
    """Number of its first row in the file, from 0."""
    rows: int
    columns: tuple[str, ...]
    keep: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """An input file as a job remembers it. Its folder may change; its name and content may not."""

    file: str
    rows: int
    blake2b: str


def pyarrow_or_raise() -> Any:
    """pyarrow with its Parquet module, or the error that names the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "reading and writing Parquet") from error
    return pyarrow


def input_files(given: Iterable[str | Path]) -> list[Path]:
    """Parquet files, and those in given folders, sorted by name; each once."""
    found: list[Path] = []
    for path in map(Path, given):
        inside = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: no *.parquet in this folder")
        found += inside
    if not found:
        raise InputError("no input; name Parquet files or a folder of them")
    whole = sorted(path.resolve() for path in found)
    for path, after in pairwise(whole):
        if path == after:
            raise InputError(f"{path} is given twice; its rows would be there twice")
    for path in whole:
        insist_on_file(path)
        if path.suffix != ".parquet":
            raise InputError(f"{path}: bulk encoding reads Parquet; write the table as .parquet first")
    return whole


def cut(paths: Sequence[Path], bulk: Bulk) -> tuple[list[Source], list[Part]]:
    """Every file's fingerprint, and all parts in the order of the input. Reads footers and samples, not the rows.

    Raises:
        InputError: an unreadable file, a column that is missing or is not text, no rows at all; the file is named.
    """
    arrow = pyarrow_or_raise()
    sources, parts = [], []
    for number, path in enumerate(paths):
        try:
            with arrow.parquet.ParquetFile(path) as file:
                columns = _text_columns(arrow, path, file.schema_arrow, bulk)
                keep = _kept(path, file.schema_arrow.names, bulk)
                sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        except (arrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a readable Parquet file ({error})") from error
        sources.append(Source(path.name, sum(sizes), fingerprint(path)))
        first = start = rows = 0
        for group, size in enumerate(sizes):
            rows += size
            if rows >= bulk.part_rows or (group == len(sizes) - 1 and rows):
                name = f"part-{number:05d}-{first:05d}.parquet"
                parts.append(Part(name, str(path), (first, group + 1), start, rows, columns, keep))
                first, start, rows = group + 1, start + rows, 0
    if not parts:
        raise InputError(f"{paths[0]}{' and the other files' if len(paths) > 1 else ''}: no rows, nothing to encode")
    return sources, parts


def _text_columns(arrow: Any, path: Path, schema: Any, bulk: Bulk) -> tuple[str, ...]:
    names = schema.names
    body = "text" if "text" in names or "document" not in names else "document"
    wanted = bulk.columns or (*(["title"] if "title" in names and body in names else []), body)
    for name in wanted:
        if names.count(name) != 1:
            what = "no column" if name not in names else "more than one column"
            raise InputError(f"{path}: {what} {name!r}; it has {', '.join(map(repr, names))}")
        kind, types = schema.field(name).type, arrow.types
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not any(is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_null)):
            raise InputError(f"{path}: column {name!r} must be text, it is {kind}; choose others by columns (--text)")
    return wanted


def _kept(path: Path, names: list[str], bulk: Bulk) -> tuple[str, ...]:
    if bulk.keep is None:
        return next(((name,) for name in ("_id", "id") if names.count(name) == 1), ())
    for name in bulk.keep:
        if names.count(name) != 1:
            raise InputError(f"{path}: no column {name!r} to keep; it has {', '.join(map(repr, names))}")
    return bulk.keep
