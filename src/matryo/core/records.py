"""Reading data: pairs, retrieval sets (BEIR layout), scored pairs (STS), labelled texts, vectors. Never pickle.

A malformed row is an InputError that names file and line. Nothing is returned unless the whole file is good.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.metrics import Judgements

TABLES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
Row = dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """Training pairs: `anchors[i]` belongs with `positives[i]`; `negatives[j][i]` is row i's j-th hard negative."""

    anchors: list[str]
    positives: list[str]
    negatives: list[list[str]] = field(default_factory=list)
    groups: list[str] | None = None
    """Rows of one group are never each other's negatives."""

    def __len__(self) -> int:
        return len(self.anchors)


@dataclass(frozen=True)
class Retrieval:
    """A retrieval set: texts, and which documents are relevant to which query (judged queries only).

    A document may be blank: real collections hold some. It is never encoded and never found, and where it is relevant
    it stays in the denominator of every metric.
    """

    name: str
    queries: list[str]
    query_ids: list[str]
    documents: list[str]
    document_ids: list[str]
    judged: Judgements

    @cached_property
    def written(self) -> NDArray[np.int64]:
        """(M,) positions of the documents that have text, rising."""
        return np.array([n for n, text in enumerate(self.documents) if text.strip()], dtype=np.int64)

    @property
    def texts(self) -> list[str]:
        """The M documents that have text: what there is to encode."""
        return [self.documents[n] for n in self.written]


@dataclass(frozen=True)
class ScoredPairs:
    """Sentence pairs with a similarity score (STS)."""

    name: str
    first: list[str]
    second: list[str]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Labelled:
    """Texts and the class of each."""

    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)


def rows(path: str | Path, without: tuple[str, ...] = ()) -> Iterator[tuple[int, Row]]:
    """(line number, row) of a JSONL, CSV, TSV or Parquet file, gzipped or not; of Parquet not the columns `without`."""
    path = Path(path)
    insist_on_file(path)
    kind = next((s for s in sorted(TABLES, key=len, reverse=True) if path.name.endswith(s)), None)
    if kind is None:
        raise InputError(f"{path}: unknown kind of file; use one of {', '.join(TABLES)}")
    if kind == ".parquet":
        yield from _parquet_rows(path, without)
        return
    try:
        opened = gzip.open if kind.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8", newline="") as stream:
            if ".json" in kind:
                yield from _json_rows(path, stream)
            else:
                yield from _csv_rows(path, stream, "\t" if ".tsv" in kind else ",")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable {kind} file in UTF-8 ({error})") from error


def insist_on_file(path: Path) -> None:
    """Raise unless the path is a file."""
    if not path.is_file():
        raise InputError(f"{path} is a folder; name a file in it" if path.is_dir() else f"no such file: {path}")


def _json_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path} line {line}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {line}: each line must be a JSON object, got {type(row).__name__}")
        yield line, row


def _csv_rows(path: Path, stream: TextIO, delimiter: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(stream, delimiter=delimiter)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path} line {reader.line_num}: expected {len(reader.fieldnames or [])} columns")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: {error}") from error


def _parquet_rows(path: Path, without: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "reading Parquet") from error
    line = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name not in without]
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error


def text_of(path: str | Path, line: int, row: Row, column: str) -> str:
    """The text in a column of a row; missing, null, not text, blank or holding a lone surrogate is an InputError."""
    if column not in row:
        raise InputError(f"{path} line {line}: no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}")
    value = row[column]
    if not isinstance(value, str):
        raise InputError(f"{path} line {line}: column {column!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{path} line {line}: column {column!r} is empty; remove the row or fill it")
    if not _is_unicode(value):
        raise InputError(f"{path} line {line}: column {column!r} holds a lone surrogate, which is not valid text")
    return value


def document_of(path: str | Path, line: int, row: Row, column: str = "text") -> str:
    """Title and text of a document, joined; it may be one of them alone, as in BEIR itself, and is "" with neither."""
    title, body = str(row.get("title") or "").strip(), row.get(column)
    if title:
        text_of(path, line, {"title": title}, "title")
    if (title or column in row) and (body is None or (isinstance(body, str) and not body.strip())):
        return title
    text = text_of(path, line, row, column)
    return f"{title} {text}".strip() if title else text


def _is_unicode(text: str) -> bool:
    """Whether a text can be written down: JSON and command lines may hold lone surrogates, which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_pairs(path: str | Path) -> Pairs:
    """Pairs or triplets from columns `anchor, positive[, negative, negative_2, ...]` and optional `group`."""
    anchors: list[str] = []
    positives: list[str] = []
    negatives: list[list[str]] = []
    groups: list[str] = []
    columns: list[str] | None = None
    grouped = False
    for line, row in rows(path):
        if columns is None:
            columns = sorted((c for c in row if c == "negative" or c.startswith("negative_")), key=_negative_order)
            negatives = [[] for _ in columns]
            grouped = "group" in row
        anchors.append(text_of(path, line, row, "anchor"))
        positives.append(text_of(path, line, row, "positive"))
        for into, column in zip(negatives, columns, strict=True):
            into.append(text_of(path, line, row, column))
        if grouped:
            if row.get("group") is None:
                raise InputError(f"{path} line {line}: column 'group' is missing here but present in the first row")
            groups.append(str(row["group"]))
    if not anchors:
        raise InputError(f"{path}: no rows; expected columns anchor and positive")
    return Pairs(anchors, positives, negatives, groups if grouped else None)


def _negative_order(column: str) -> tuple[int, str]:
    tail = column.removeprefix("negative").removeprefix("_")
    return (int(tail) if tail.isdecimal() else 1, column)


def read_retrieval(folder: str | Path, split: str = "test") -> Retrieval:
    """A BEIR folder: `corpus.jsonl[.gz]`, `queries.jsonl[.gz]`, `qrels/<split>.tsv`. Title and text are joined.

    A document with neither title nor text is kept as "" (see `Retrieval`); a query without text is an InputError.
    """
    folder = Path(folder)
    corpus, queries = one_of(folder, "corpus"), one_of(folder, "queries")
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        there = sorted(p.stem for p in (folder / "qrels").glob("*.tsv"))
        raise InputError(f"{folder}: no judgements for split {split!r}; it has {', '.join(there) or 'no qrels/*.tsv'}")
    documents = _texts(corpus, titled=True)
    asked = _texts(queries, titled=False)
    place = {key: n for n, key in enumerate(documents)}
    grades: dict[str, dict[int, float]] = {}
    for line, row in rows(qrels):
        query, document, grade = (str(row.get(c, "")) for c in ("query-id", "corpus-id", "score"))
        if query not in asked or document not in place:
            missing = f"query {query!r}" if query not in asked else f"document {document!r}"
            raise InputError(f"{qrels} line {line}: {missing} is in the judgements but not in the texts")
        try:
            value = float(grade)
        except ValueError as error:
            raise InputError(f"{qrels} line {line}: score must be a number, got {grade!r}") from error
        if value > 0:
            grades.setdefault(query, {})[place[document]] = value
    if not grades:
        raise InputError(f"{qrels}: no query has a relevant document, so nothing can be measured")
    kept = [key for key in asked if key in grades]
    flat = [(n, d, g) for n, key in enumerate(kept) for d, g in sorted(grades[key].items())]
    judged = Judgements(
        np.array([n for n, _, _ in flat], np.int64),
        np.array([d for _, d, _ in flat], np.int64),
        np.array([g for _, _, g in flat], np.float64),
        len(kept),
    )
    return Retrieval(
        folder.resolve().name, [asked[k] for k in kept], kept, list(documents.values()), list(documents), judged
    )


def one_of(folder: Path, stem: str) -> Path:
    """The JSONL file of this stem in a folder in the BEIR layout, gzipped or not."""
    for ending in (".jsonl", ".jsonl.gz"):
        if (folder / f"{stem}{ending}").is_file():
            return folder / f"{stem}{ending}"
    raise InputError(f"{folder}: no {stem}.jsonl or {stem}.jsonl.gz; a retrieval set is a folder in the BEIR layout")


def _texts(path: Path, titled: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    for line, row in rows(path):
        key = str(row.get("_id", ""))
        if not key:
            raise InputError(f"{path} line {line}: no '_id'")
        if key in texts:
            raise InputError(f"{path} line {line}: '_id' {key!r} appears twice")
        texts[key] = document_of(path, line, row) if titled else text_of(path, line, row, "text")
    if not texts:
        raise InputError(f"{path}: no rows")
    if not any(texts.values()):
        raise InputError(f"{path}: no document has a title or a text, so there is nothing to find")
    return texts


def read_sts(path: str | Path) -> ScoredPairs:
    """Scored pairs from columns `sentence1, sentence2, score`, or `anchor, positive, score`."""
    path = Path(path)
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    names: tuple[str, str] | None = None
    for line, row in rows(path):
        if names is None:
            names = ("anchor", "positive") if "anchor" in row and "sentence1" not in row else ("sentence1", "sentence2")
        first.append(text_of(path, line, row, names[0]))
        second.append(text_of(path, line, row, names[1]))
        try:
            scores.append(float(row["score"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} line {line}: 'score' must be a number, got {row.get('score')!r}") from error
        if not np.isfinite(scores[-1]):
            raise InputError(f"{path} line {line}: 'score' must be finite, got {row['score']!r}")
    values = np.array(scores)
    if len(values) < 2 or values.min() == values.max():
        raise InputError(f"{path}: needs at least two pairs with finite, differing scores")
    return ScoredPairs(path.name.split(".")[0], first, second, values)


def read_labelled(path: str | Path) -> Labelled:
    """Labelled texts from columns `text, label`; a label is text or a whole number, and is kept as text."""
    texts: list[str] = []
    labels: list[str] = []
    for line, row in rows(path):
        texts.append(text_of(path, line, row, "text"))
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
            missing = label is None or not str(label).strip()
            said = "is missing" if missing else f"must be text or a whole number, got {label!r}"
            raise InputError(f"{path} line {line}: column 'label' {said}; name the row's class or remove the row")
        labels.append(str(label))
    if len(set(labels)) < 2:
        raise InputError(
            f"{path}: needs rows of at least two classes in columns text and label, got {sorted(set(labels))}"
        )
    return Labelled(texts, labels)


def read_texts(path: str | Path) -> list[str]:
    """Texts from the column `text`."""
    texts = [text_of(path, line, row, "text") for line, row in rows(path)]
    if not texts:
        raise InputError(f"{path}: no rows; expected a column text")
    return texts


def read_vectors(path: str | Path) -> NDArray[np.float32]:
    """(N, D) vectors from `.npy` (memory-mapped), `.safetensors` (its only tensor) or Parquet (column `vector`)."""
    path = Path(path)
    insist_on_file(path)
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".safetensors":
            tensors = _safetensors(path)
            if len(tensors) != 1:
                raise InputError(f"{path}: expected one tensor, it holds {sorted(tensors)}")
            array = next(iter(tensors.values()))
        elif path.suffix == ".parquet":
            array = _parquet_vectors(path)
        else:
            raise InputError(f"{path}: unknown kind of vectors; use .npy, .safetensors or .parquet")
    except (ValueError, TypeError, KeyError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable file of vectors ({error})") from error
    return check_vectors(array, str(path))


def _safetensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable file of vectors ({error})") from error


def _parquet_vectors(path: Path) -> NDArray[np.float32]:
    found: list[NDArray[np.float32]] = []
    for line, row in rows(path):
        if "vector" not in row:
            raise InputError(f"{path} line {line}: no column 'vector'; it has {', '.join(map(repr, row))}")
        vector = row["vector"]
        if not isinstance(vector, list) or (found and len(vector) != len(found[0])):
            got = f"{len(vector)} of them" if isinstance(vector, list) else type(vector).__name__
            raise InputError(f"{path} line {line}: 'vector' must be a list of as many numbers in every row, got {got}")
        found.append(np.array(vector, dtype=np.float32))
    if not found:
        raise InputError(f"{path}: no rows")
    return np.stack(found)


def check_vectors(
    array: NDArray[Any], name: str = "vectors", width: int | None = None, first: int = 0
) -> NDArray[np.float32]:
    """(N, D) float32, refusing another shape or width, NaN, Inf and all-zero rows; the first bad row is named.

    Rows are counted from `first`.
    """
    if array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(f"{name}: expected (N, D) floating point, got shape {array.shape} of {array.dtype}")
    if width is not None and array.shape[1] != width:
        raise InputError(f"{name}: expected width {width}, got {array.shape[1]}")
    for start in range(0, len(array), 65536):
        part = np.asarray(array[start : start + 65536], dtype=np.float32)
        sums = np.einsum("nd,nd->n", part, part, dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(sums) | (sums == 0))
        if len(bad):
            what = "is all zeros" if sums[bad[0]] == 0 else "holds NaN or Inf"
            raise InputError(f"{name}: row {first + start + int(bad[0])} {what}; remove it or encode it again")
    return array if array.dtype == np.float32 else array.astype(np.float32)


def check_texts(texts: Sequence[object], what: str = "texts", blank: bool = False) -> list[str]:
    """A list of texts, none blank unless that is allowed, or an InputError that names the first bad position."""
    checked: list[str] = []
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{what}[{n}] must be text, got {type(text).__name__}")
        if not blank and not text.strip():
            raise InputError(f"{what}[{n}] is empty; there is nothing to encode")
        if not _is_unicode(text):
            raise InputError(f"{what}[{n}] holds a lone surrogate, which is not valid text; decode its bytes as UTF-8")
        checked.append(text)
    return checked
