"""What `matryo index build` and `add` read: a table of documents, vectors beside or inside it, or vectors alone.

Read twice, a batch at a time, so that neither need fit in memory: once to check every row before anything is written,
once to write.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matryo.core import records
from matryo.core.errors import InputError
from matryo.core.streams import VectorStream, fingerprint, open_vectors

if TYPE_CHECKING:
    from matryo.encoders import Model
    from matryo.index import Batch

BATCH = 2048
"""Documents encoded and committed at a time: what an interruption can cost."""
READY_BYTES = 64 << 20
"""Ready vectors committed at a time, as bytes of float32."""
ALONE = (".npy", ".safetensors")
"""Files of vectors and nothing else: their items are known by row number."""
SHOWN = 1000
"""Ids of documents left out that are kept to be shown."""

Row = tuple[str, str, dict[str, Any]]


class Documents:
    """Documents to index: their rows, checked by `check`, and `batches` of them with vectors from a file or a model."""

    def __init__(self, path: Path, vectors: Path | None, metadata: list[str], model: "Model | None") -> None:
        self.path = records.one_of(path, "corpus") if path.is_dir() else path
        self.model, self.metadata, self.rows = model, metadata, 0
        self.table = None if path.suffix in ALONE else self.path
        if self.table is None and (metadata or vectors != path):
            raise InputError(f"{path} holds vectors and nothing else; give a table of documents and --vectors {path}")
        if (model is None) == (vectors is None):
            raise InputError("give --model to encode the documents, or --vectors that are ready, one of the two")
        self.vectors: VectorStream | None = None if vectors is None else open_vectors(vectors)
        self.left: list[str] = []
        """Ids of documents that were left out as there is nothing to encode, the first of them."""
        self.left_out = 0

    @property
    def size(self) -> int:
        """Rows of a batch."""
        return BATCH if self.vectors is None else max(BATCH, min(1 << 16, READY_BYTES // (4 * self.vectors.width)))

    def fingerprint(self, identity: dict[str, Any] | None) -> str:
        """A text that differs where the files, the columns kept or the model do."""
        paths = sorted({self.path, self.vectors.path if self.vectors else self.path})
        parts = [*(fingerprint(path) for path in paths), repr(self.metadata), repr(sorted((identity or {}).items()))]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    @property
    def width(self) -> int:
        """Dimensions of the vectors, whichever of the two they come from."""
        source = self.model or self.vectors
        assert source is not None
        return source.width

    def check(self, step: Callable[[int], None]) -> None:
        """Read everything once; an error names the first bad row. `step` hears of rows read."""
        keys, texts = array("q"), 0
        if self.table is None and self.vectors is not None:
            self.rows = self.vectors.rows
        for rows in _batches(self._rows(), BATCH):
            keys.extend(hash(key) for key, _, _ in rows)
            texts += sum(bool(text) for _, text, _ in rows)
            step(len(rows))
        if self.table is not None:
            self.rows = len(keys)
            self._refuse_repeats(np.frombuffer(keys, np.int64))
            if not self.rows:
                raise InputError(f"{self.path}: no rows, so there is nothing to index")
        if self.vectors is None:
            if not texts:
                raise InputError(f"{self.path}: no document has a title or a text, so there is nothing to encode")
            return
        if self.vectors.rows != self.rows:
            raise InputError(
                f"{self.vectors.path} has {self.vectors.rows} rows for {self.rows} documents; "
                "give one vector per document"
            )
        for _ in self.vectors.parts(self.size):
            pass

    def batches(self, step: Callable[[int], None], start: int = 0) -> "Iterator[tuple[Batch, list[str]]]":
        """Batches from row `start` on, each with the ids left out of it. `step` hears of rows once they are written."""
        from matryo.index import Batch

        parts = self.vectors.parts(self.size, start) if self.vectors else None
        numbers: Iterator[Row] = ((str(n), "", {}) for n in range(start, self.rows))
        table = numbers if self.table is None else islice(self._rows(), start, None)
        for rows in _batches(table, self.size):
            left = [key for key, text, _ in rows if not text and parts is None]
            kept = [row for row in rows if row[1] or parts is not None]
            keys, texts, fields = (list(column) for column in zip(*kept, strict=True)) if kept else ([], [], [])
            made = self._encoded(texts) if parts is None else next(parts)
            said = None if self.table is None else texts
            self.left += left[: SHOWN - len(self.left)]
            self.left_out += len(left)
            yield Batch(keys, made, said, [f or None for f in fields], read=len(rows)), left
            step(len(rows))

    def _rows(self) -> Iterator[Row]:
        """(id, text, metadata) of every row of the table, each checked."""
        if self.table is None:
            return
        path = self.table
        for line, row in records.rows(path, without=("vector",)):
            key = row.get("_id", row.get("id"))
            if key is None or str(key) == "":
                raise InputError(f"{path} line {line}: no '_id' or 'id'; it has {', '.join(map(repr, row))}")
            column = "text" if "text" in row or "document" not in row else "document"
            missing = [name for name in self.metadata if name not in row]
            if missing:
                raise InputError(f"{path} line {line}: no column {missing[0]!r} for metadata; it has {', '.join(row)}")
            bare = self.vectors is not None and column not in row and "title" not in row
            text = "" if bare else records.document_of(path, line, row, column)
            yield str(key), text, {name: row[name] for name in self.metadata}

    def _encoded(self, texts: list[str]) -> Any:
        """(N, D) vectors of a batch; the model does not hear of an empty one."""
        assert self.model is not None
        return self.model.encode(texts) if texts else np.empty((0, self.model.width), np.float32)

    def _refuse_repeats(self, hashes_N: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        """Eight bytes a row tell which ids might be there twice; only those are compared."""
        ordered = np.sort(hashes_N)
        twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not twice:
            return
        seen: set[str] = set()
        for key, _, _ in self._rows():
            if hash(key) in twice:
                if key in seen:
                    raise InputError(f"{self.path}: id {key!r} appears twice; ids must be distinct")
                seen.add(key)


def ready_vectors(path: Path, vectors: Path | None) -> Path | None:
    """Where ready vectors are: in a file beside the documents, in the documents' own file, or nowhere."""
    if vectors is not None or path.suffix in ALONE:
        return vectors or path
    if path.suffix != ".parquet" or not path.is_file():
        return None
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import read_schema
    except ImportError:
        return None  # reading the rows says what is missing
    try:
        return path if "vector" in read_schema(path).names else None
    except ArrowException:
        return None  # reading the rows says what is wrong


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while part := list(islice(rows, size)):
        yield part
