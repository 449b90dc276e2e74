"""The Parquet file of mined pairs: one row a pair, written row group by row group, under its name only when whole."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import MissingExtraError
from matryo.core.files import write_atomically
from matryo.mining.texts import Texts

ROW_GROUP = 8192
METADATA = b"matryo"
"""Key of the schema's metadata; the value is JSON."""


def pyarrow_or_raise() -> Any:
    """pyarrow, or the error that names the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "writing Parquet") from error
    return pyarrow


def column_names(count: int) -> list[str]:
    """negative, negative_2, negative_3, ..."""
    return ["negative", *(f"negative_{n}" for n in range(2, count + 1))][:count]


def write_table(
    path: Path,
    texts: Texts,
    groups: Sequence[str] | None,
    picks_AN: NDArray[np.int32],
    rows_R: NDArray[np.int64],
    metadata: dict[str, Any],
) -> None:
    """Write the given rows with their negatives. On any failure, `path` keeps what it held.

    Args:
        path: the file.
        texts: anchors and candidates by number, and which row pairs which.
        groups: group of each row of the pairs, or None.
        picks_AN: candidate of each negative column, for every anchor.
        rows_R: the rows to write, in order.
        metadata: goes into the schema as JSON.
    """
    pyarrow = pyarrow_or_raise()
    names = ["anchor", "positive", *column_names(picks_AN.shape[1]), *(["group"] if groups else [])]
    text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names], metadata={METADATA: text.encode()})

    def columns(rows: NDArray[np.int64]) -> Iterator[list[str]]:
        anchors = texts.row_anchor[rows]
        yield [texts.anchors[n] for n in anchors]
        yield [texts.candidates[n] for n in texts.row_positive[rows]]
        for picks in picks_AN[anchors].T:
            yield [texts.candidates[n] for n in picks]
        if groups:
            yield [groups[n] for n in rows]

    def write(temporary: Path) -> None:
        with pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for start in range(0, len(rows_R), ROW_GROUP):
                writer.write_table(pyarrow.table(list(columns(rows_R[start : start + ROW_GROUP])), schema=schema))

    write_atomically(path, write)
