"""A plan, a filter and a batch in Milvus's words: columns of vectors and their indexes, expressions, rows.

Metadata lies there twice: as it was given, and apart by type in `numbers` (true and false as 1 and 0) and `texts`,
where filters look. A comparison is asked only of a field that exists and has its type, so it is true or false, and
`not` its opposite, whatever a release makes of a lacking field or of one of another type.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from matryo.core.codecs import Binary
from matryo.core.errors import InputError, MissingExtraError
from matryo.core.plan import Plan, Stage
from matryo.core.prefix import truncate
from matryo.index.funnel import Float32s
from matryo.index.where import Compare, Condition, Either, Every, Unless

try:
    from pymilvus import DataType, MilvusClient
except ImportError as error:
    raise MissingExtraError("pymilvus", "milvus", "an index in Milvus") from error

FULL = "vector"
"""The column of full vectors."""
ITEM = ("row", "document", "metadata", "given", FULL)
"""What is read of an item besides its id."""
HAS_DOCUMENT, HAS_METADATA = 1, 2
"""Bits of `given`: a text that is not there lies as an empty one."""
LONGEST = 65_535
"""Bytes of a text field and of a JSON field."""
SENT = 4 << 20
"""Bytes of one request, about; a batch is cut into such parts."""
INDEXES = {
    ("flat", "float32"): "FLAT",
    ("hnsw", "float32"): "HNSW",
    ("ivf", "float32"): "IVF_FLAT",
    ("ivf", "int8"): "IVF_SQ8",
    ("flat", "binary"): "BIN_FLAT",
    ("ivf", "binary"): "BIN_IVF_FLAT",
}
LINKS, FOLLOWED, CELLS, PROBED = 16, 64, 100, 8
"""M and ef of a graph, cells and probe of an inverted file, where the plan does not say."""
EF_BUILD = 200
NOTHING = 'id == ""'
"""True of no item."""


@dataclass(frozen=True)
class Column:
    """A field of vectors, and the index that a first stage scans: the stage less what a search may choose anew."""

    stage: Stage
    full: int

    @property
    def key(self) -> str:
        """As the note has it: a stage that `column` reads back."""
        return str(self.stage)

    @property
    def exact(self) -> bool:
        """Whether its scan is exact, and scores as we do."""
        return self.stage.scan == "flat" and self.stage.code == "float32"

    @property
    def name(self) -> str:
        """The field's name."""
        if self.exact and self.stage.width == self.full:
            return FULL
        options = "".join(f"_{self.stage.scan}{value}" for _, value in self.stage.options)
        return f"p{self.stage.width}_{self.stage.code}{options}"

    @property
    def binary(self) -> bool:
        return self.stage.code == "binary"

    @property
    def metric(self) -> str:
        return "HAMMING" if self.binary else "IP"

    def index(self) -> dict[str, Any]:
        """Arguments of `IndexParams.add_index`."""
        given = dict(self.stage.options)
        params = {"M": given["M"], "efConstruction": max(EF_BUILD, 2 * given["M"])} if "M" in given else {}
        if "cells" in given:
            params = {"nlist": given["cells"]}
        kind = INDEXES[self.stage.scan, self.stage.code]
        return {"field_name": self.name, "index_type": kind, "metric_type": self.metric, "params": params}

    def scan(self, asked: Stage, limit: int) -> dict[str, Any]:
        """How to scan it: `search_params`."""
        options = dict(asked.options)
        params = {
            "flat": {},
            "hnsw": {"ef": max(limit, options.get("ef", FOLLOWED))},
            "ivf": {"nprobe": options.get("probe", PROBED)},
        }[asked.scan]
        return {"metric_type": self.metric, "params": params}

    def encode(self, units_ND: Float32s) -> list[Any]:
        """The rows as the client takes them."""
        prefixes = units_ND if self.stage.width == self.full else truncate(units_ND, self.stage.width)
        if not self.binary:
            return list(prefixes)
        return [row.tobytes() for row in Binary(self.stage.width).encode(prefixes)]


def column_of(stage: Stage, full: int) -> Column:
    """The column that a first stage scans."""
    options = dict(stage.options)
    kept = {
        "flat": (),
        "hnsw": (("M", options.get("M", LINKS)),),
        "ivf": (("cells", options.get("cells", CELLS)),),
    }[stage.scan]
    return Column(Stage(stage.width, stage.code, stage.scan, kept), full)


def read_column(key: str, full: int) -> Column:
    """The column of a `Column.key`."""
    return Column(Plan.parse(key).stages[0], full)


def schema_of(columns: Sequence[Column], whole: bool) -> tuple[Any, Any]:
    """Schema and indexes of a collection of these columns; `whole` for that of the items themselves."""
    schema, indexes = (
        MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False),
        MilvusClient.prepare_index_params(),
    )
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST)
    schema.add_field("row", DataType.INT64)
    if whole:
        schema.add_field("document", DataType.VARCHAR, max_length=LONGEST)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("given", DataType.INT8)
    schema.add_field("numbers", DataType.JSON)
    schema.add_field("texts", DataType.JSON)
    for column in columns:
        kind = DataType.BINARY_VECTOR if column.binary else DataType.FLOAT_VECTOR
        schema.add_field(column.name, kind, dim=column.stage.width)
        indexes.add_index(**column.index())
    return schema, indexes


def check_sizes(keys: Sequence[str], documents: Sequence[str | None], metadata: Sequence[str | None]) -> None:
    """Raise where a text is longer than Milvus holds; before anything is sent."""
    named = (("ids", keys, "shorten it"), ("documents", documents, "split it"), ("metadata", metadata, "shorten it"))
    for what, texts, cure in named:
        for n, text in enumerate(texts):
            if text is not None and len(text) * 4 > LONGEST and len(text.encode()) > LONGEST:
                raise InputError(
                    f"{what}[{n}] takes {len(text.encode()):,} bytes; Milvus holds {LONGEST:,} in a field: {cure}"
                )


def parts(count: int, sizes: Sequence[int]) -> Iterator[slice]:
    """The items of a batch, about `SENT` bytes at a time."""
    start = total = 0
    for n in range(count):
        if n > start and total + sizes[n] > SENT:
            yield slice(start, n)
            start, total = n, 0
        total += sizes[n]
    if count:
        yield slice(start, count)


def rows_of(
    keys: Sequence[str],
    first_row: int,
    columns: Sequence[Column],
    units_ND: Float32s,
    metadata: Sequence[str | None],
    documents: Sequence[str | None] | None,
) -> list[dict[str, Any]]:
    """Rows as the client takes them; `documents` are given for the items, not for prefixes that lie apart."""
    coded = {column.name: column.encode(units_ND) for column in columns}
    found = []
    for n, (key, text) in enumerate(zip(keys, metadata, strict=True)):
        fields = {} if text is None else json.loads(text)
        row = {"id": key, "row": first_row + n, **by_type(fields), **{name: rows[n] for name, rows in coded.items()}}
        if documents is not None:
            document = documents[n]
            given = HAS_DOCUMENT * (document is not None) | HAS_METADATA * (text is not None)
            row |= {"document": document or "", "metadata": fields, "given": given}
        found.append(row)
    return found


def by_type(fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metadata apart by type, as filters ask."""
    numbers = {name: int(v) if isinstance(v, bool) else v for name, v in fields.items() if isinstance(v, int | float)}
    return {"numbers": numbers, "texts": {name: v for name, v in fields.items() if isinstance(v, str)}}


def expression(where: Condition | None) -> str:
    """A filter as Milvus reads it; empty where there is none."""
    match where:
        case None:
            return ""
        case Every(parts) | Either(parts):
            word = " and " if isinstance(where, Every) else " or "
            return "(" + word.join(expression(part) for part in parts) + ")"
        case Unless(part):
            return f"(not {expression(part)})"
        case Compare(name, "!=", value):
            return expression(Unless(Compare(name, "=", value)))
        case Compare(name, "not_in", value):
            return expression(Unless(Compare(name, "in", value)))
        case Compare(name, "in", value):
            return expression(Either(tuple(Compare(name, "=", one) for one in value))) if value else f"({NOTHING})"
        case Compare(name, "=", None):
            return f"((not (exists numbers[{quote(name)}])) and (not (exists texts[{quote(name)}])))"
        case Compare(name, operator, value):
            place = f"{'texts' if isinstance(value, str) else 'numbers'}[{quote(name)}]"
            said = quote(value) if isinstance(value, str) else repr(int(value) if isinstance(value, bool) else value)
            return f"((exists {place}) and {place} {'==' if operator == '=' else operator} {said})"


def among(keys: Sequence[str], where: str = "") -> str:
    """The items of these ids, those that a filter allows."""
    said = f"id in [{', '.join(map(quote, keys))}]"
    return f"{said} and {where}" if where else said


def quote(text: str) -> str:
    """A text as a literal. Other control characters stand as they are."""
    for raw, said in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(raw, said)
    return f'"{text}"'


def cosines(vectors_RD: Float32s, query_D: Float32s, width: int) -> Float32s:
    """(R,) cosines of the first `width` dimensions, of the stored rows; the same row gets the same bits everywhere."""
    if width < len(query_D):
        vectors_RD, query_D = truncate(vectors_RD, width), truncate(query_D[None], width)[0]
    # Sums in float64 differ by where a row stands only far below what float32 shows.
    scores: Float32s = (vectors_RD.astype(np.float64) @ query_D.astype(np.float64)).astype(np.float32)
    return scores
