"""One part: read it a batch at a time, encode, write its file under a temporary name, rename, record what it holds."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from matryo.bulk.options import Bulk
from matryo.bulk.parts import Part, pyarrow_or_raise
from matryo.core.errors import DamagedError, InputError
from matryo.core.files import digest, write_atomically, write_text
from matryo.encoders.folder import fingerprint

if TYPE_CHECKING:
    from matryo.encoders import Model

BATCH = 4096
"""Rows read and encoded at a time."""
GROUP_BYTES = 32 << 20
"""Codes gathered before they are written as a row group."""
RECORDS = "records"
SHOWN = 100
METADATA = b"matryo"
"""Key of the schema's metadata; the value is JSON."""

Record = dict[str, Any]


def identity_of(model: "Model", name: str, bulk: Bulk) -> dict[str, str]:
    """What decides the codes that a model gives: digests of its weights, and of its int8 ranges if used."""
    found = fingerprint(name) or {"name": name}
    if bulk.code == "int8":
        assert bulk.width is not None
        scale = np.ascontiguousarray(model.card.int8_scales[bulk.width])
        found |= {"int8_ranges": hashlib.blake2b(scale.tobytes(), digest_size=16).hexdigest()}
    return found


def encode_part(model: "Model", identity: dict[str, str], part: Part, bulk: Bulk, out: Path) -> Record:
    """Make `out/part.name` and its record, unless both are there and agree. Safe to repeat, anywhere, at any time.

    The same part gives the same bytes under the same name wherever it is encoded, so one that is done twice, as when
    the machine that did it was taken for dead, is there once.

    Raises:
        InputError: rows that cannot be read or encoded, named by file and row. StorageError: the disk refused.
    """
    done = finished(out, part.name)
    if done is not None:
        return done
    left = _LeftOut()
    write_atomically(out / part.name, lambda path: _write(path, model, identity, part, bulk, left))
    file = out / part.name
    record = {
        "name": part.name,
        "file": Path(part.path).name,
        "row_groups": list(part.groups),
        "first_row": part.start,
        "read": part.rows,
        "rows": part.rows - left.count,
        "left_out": left.count,
        "rows_left_out": left.rows,
        "bytes": file.stat().st_size,
        "blake2b": digest(file),
    }
    write_text(out / RECORDS / f"{part.name}.json", json.dumps(record) + "\n")
    return record


def finished(out: Path, name: str) -> Record | None:
    """The record of a part whose file is there with the recorded size and digest; None if it has to be made (again)."""
    try:
        record: Record = json.loads((out / RECORDS / f"{name}.json").read_text())
        file = out / name
        whole = file.stat().st_size == record["bytes"] and digest(file) == record["blake2b"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


@dataclass
class _LeftOut:
    count: int = 0
    rows: list[int] = field(default_factory=list)
    """The first of them, as row numbers in the input file."""

    def add(self, rows: NDArray[np.int64]) -> None:
        self.count += len(rows)
        self.rows += [int(row) for row in rows[: SHOWN - len(self.rows)]]


def _write(path: Path, model: "Model", identity: dict[str, str], part: Part, bulk: Bulk, left: _LeftOut) -> None:
    """The file of a part: `row` (number in the input file), the columns kept, `vector`."""
    arrow = pyarrow_or_raise()
    schema = _schema(arrow, model, identity, part, bulk)
    held: list[Any] = []
    # Vectors neither compress nor repeat, and nobody looks for their least and greatest.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with arrow.parquet.ParquetWriter(path, schema, **options) as writer:

        def flush() -> None:
            if held:
                writer.write_table(arrow.Table.from_batches(held, schema))
                held.clear()

        for start, batch in _batches(arrow, part):
            texts = _texts(part, start, batch)
            rows = np.flatnonzero([bool(text.strip()) for text in texts])
            codes, good = _encoded(model, [texts[n] for n in rows], part, start + rows, bulk)
            rows = rows[good]
            left.add(np.setdiff1d(np.arange(len(texts)), rows) + start)
            flat = arrow.array(codes.reshape(-1))
            vectors = arrow.FixedSizeListArray.from_arrays(flat, type=schema.field("vector").type)
            kept = [batch.column(name).take(arrow.array(rows)) for name in part.keep]
            held.append(arrow.RecordBatch.from_arrays([arrow.array(start + rows), *kept, vectors], schema=schema))
            if sum(one.nbytes for one in held) >= GROUP_BYTES:
                flush()
        flush()


def _schema(arrow: Any, model: "Model", identity: dict[str, str], part: Part, bulk: Bulk) -> Any:
    """Columns, and as JSON in the metadata what is needed to read the codes."""
    assert bulk.width is not None
    sample = model.encode([], width=bulk.width, code=bulk.code)
    about: dict[str, Any] = {"model": identity, "width": bulk.width, "code": bulk.code}
    if bulk.code == "int8":
        about["scale"] = [float(x) for x in model.card.int8_scales[bulk.width]]
    read = arrow.parquet.read_schema(part.path)
    vector = arrow.list_(arrow.from_numpy_dtype(sample.dtype), sample.shape[1])
    fields = [("row", arrow.int64()), *((name, read.field(name).type) for name in part.keep), ("vector", vector)]
    return arrow.schema(fields, metadata={METADATA: json.dumps(about).encode()})


def _batches(arrow: Any, part: Part) -> Iterator[tuple[int, Any]]:
    """(number of the first row, batch) of a part, in order."""
    start, first, stop = part.start, *part.groups
    columns = list(dict.fromkeys((*part.columns, *part.keep)))
    where = f"{part.path} row groups {first} to {stop - 1}"
    try:
        with arrow.parquet.ParquetFile(part.path) as file:
            read = file.iter_batches(BATCH, row_groups=list(range(first, stop)), columns=columns, use_threads=False)
            for batch in read:
                yield start, batch
                start += batch.num_rows
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{where}: not readable ({' '.join(str(error).split())})") from error
    if start - part.start != part.rows:
        raise DamagedError(
            f"{where}: {start - part.start} rows where the footer said {part.rows}; it was changed meanwhile"
        )


def _texts(part: Part, start: int, batch: Any) -> list[str]:
    """The text of each row, "" where there is none: titles stripped, then the last column as it is."""
    try:
        columns = [batch.column(name).to_pylist() for name in part.columns]
    except UnicodeDecodeError as error:
        rows = f"rows {start} to {start + batch.num_rows - 1}"
        raise InputError(f"{part.path} {rows}: text that is not UTF-8 ({error}); write it as UTF-8") from error
    return [_joined([value or "" for value in values]) for values in zip(*columns, strict=True)]


def _joined(values: list[str]) -> str:
    *titles, body = values
    head = " ".join(title.strip() for title in titles if title.strip())
    if not body.strip():
        return head
    return f"{head} {body}".strip() if head else body


def _encoded(
    model: "Model", texts: list[str], part: Part, rows: NDArray[np.int64], bulk: Bulk
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Codes of the texts that can be encoded, and which those are."""
    options: dict[str, Any] = {"width": bulk.width, "code": bulk.code, "batch_size": bulk.batch_size}
    good = np.ones(len(texts), np.bool_)
    try:
        return model.encode(texts, **options), good
    except InputError as error:
        for n, text in enumerate(texts):
            try:
                model.encode([text], **options)
            except InputError as refused:
                if bulk.bad == "refuse":
                    raise InputError(
                        f"{part.path} row {rows[n]} (from 0): {refused}; fill or remove the row, or leave such rows "
                        "out with bad='skip' (--bad skip)"
                    ) from error
                good[n] = False
        if good.all():
            raise
    return model.encode([text for text, fine in zip(texts, good, strict=True) if fine], **options), good
