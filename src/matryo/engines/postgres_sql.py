"""A plan, a filter and a batch in PostgreSQL's words. Values are bound; names are checked before they get here.

The funnel is one statement: a materialised common table expression per stage, ordered by the distance of the stage's
prefix, and the exact full-width order at the end (pgvector's `subvector`, `halfvec`, `binary_quantize`).
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg.types.json import Jsonb

from matryo.core.plan import Plan, Stage
from matryo.core.prefix import truncate
from matryo.index.funnel import Float32s
from matryo.index.where import Compare, Condition, Either, Every, Unless

TYPES = {"float16": "halfvec", "float32": "vector"}
SENT_AS = {"float16": ">f2", "float32": ">f4"}
OPERATORS = {"float32": "vector_cosine_ops", "float16": "halfvec_cosine_ops", "binary": "bit_hamming_ops"}
COPY_HEADER, COPY_END = b"PGCOPY\n\xff\r\n\0" + b"\0" * 8, b"\xff\xff"
SENT = 1 << 20
"""Bytes handed to the driver at a time."""


@dataclass(frozen=True)
class Vector:
    """A bound value in pgvector's binary form: a text of as many numbers takes milliseconds to write and read."""

    data: bytes

    @classmethod
    def of(cls, row_D: Float32s, code: str) -> "Vector":
        """A row as the type of `code`."""
        return cls(struct.pack("!hh", len(row_D), 0) + row_D.astype(SENT_AS[code]).tobytes())


class VectorDumper(Dumper):
    """Sends a `Vector`, and names no type: the statement's cast does. Types of pgvector have no fixed numbers."""

    format = Format.BINARY

    def dump(self, obj: Vector) -> bytes:
        return obj.data


Words = tuple[sql.Composed | sql.SQL, list[Any]]


def expression(stage: Stage) -> sql.Composed:
    """What a stage compares, over the column `vector`; an index is built on the very same expression.

    Cells are cut twice, which changes nothing but that they are another expression than a graph's: of two indexes on
    one expression the server takes the cheaper, whichever the plan meant.
    """
    width = sql.Literal(stage.width)
    cut = sql.SQL("subvector(vector, 1, {})").format(width)
    if stage.scan == "ivf":
        cut = sql.SQL("subvector({}, 1, {})").format(cut, width)
    if stage.code == "binary":
        return sql.SQL("binary_quantize({})::bit({})").format(cut, width)
    kind = "halfvec" if stage.code == "float16" else "vector"
    return sql.SQL("{}::" + kind + "({})").format(cut, width)


def distance(stage: Stage, query_D: Float32s) -> Words:
    """The stage's distance of an item from the query, whose prefix is cut and renormalised here."""
    prefix = truncate(query_D[None], stage.width)[0]
    if stage.code == "binary":
        return sql.SQL("{} <~> binary_quantize(%s::vector)").format(expression(stage)), [Vector.of(prefix, "float32")]
    words = sql.SQL("{} <=> %s::" + TYPES[stage.code]).format(expression(stage))
    return words, [Vector.of(prefix, stage.code)]


def funnel(table: sql.Identifier, plan: Plan, query_D: Float32s, k: int, where: Condition | None, tie: str) -> Words:
    """One statement that answers one query: rows of (id, score, document, metadata as text), best first.

    Args:
        tie: column that orders equal scores, where the first stage is exact.
    """
    full = len(query_D)
    exact = sql.SQL("(vector::vector({}) <#> %s::vector)").format(sql.Literal(full))
    condition, values = condition_of(where)
    source: sql.Identifier = table
    parts: list[sql.Composed] = []
    stages = list(plan.stages)
    if stages[-1].width == full and stages[-1].code == "float32" and (len(stages) > 1 or stages[-1].scan == "flat"):
        stages.pop()  # the final order is this stage
    bound: list[Any] = []
    for n, stage in enumerate(stages):
        words, given = distance(stage, query_D)
        then = sql.SQL("" if stage.scan != "flat" else ", {}").format(sql.Identifier(tie))
        keep, name = max(k, stage.keep or k), sql.Identifier(f"stage{n + 1}")
        parts.append(
            sql.SQL("{} AS MATERIALIZED (SELECT row, id, vector FROM {} {} ORDER BY {}{} LIMIT {})").format(
                name, source, condition if n == 0 else sql.SQL(""), words, then, sql.Literal(keep)
            )
        )
        bound += (values if n == 0 else []) + given
        source = name
    best = sql.SQL("best AS MATERIALIZED (SELECT row, id, {} AS far FROM {} {} ORDER BY far, {} LIMIT {})").format(
        exact, source, sql.SQL("") if stages else condition, sql.Identifier(tie), sql.Literal(k)
    )
    bound += [Vector.of(query_D, "float32"), *([] if stages else values)]
    return sql.SQL(
        "WITH {} SELECT t.id, -best.far, t.document, t.metadata::text FROM best JOIN {} t USING (id) "
        "ORDER BY best.far, {}"
    ).format(sql.SQL(", ").join([*parts, best]), table, sql.Identifier("best", tie)), bound


def by_prefix(table: sql.Identifier, query_D: Float32s, width: int, k: int, where: Condition | None, tie: str) -> Words:
    """One statement that answers by the exact cosines of the first `width` dimensions alone; `tie` as in `funnel`."""
    words, given = distance(Stage(width, "float32"), query_D)
    condition, values = condition_of(where)
    return sql.SQL(
        "SELECT id, 1 - far, document, metadata::text FROM "
        "(SELECT *, {} AS far FROM {} {} ORDER BY far, {} LIMIT {}) best ORDER BY far, {}"
    ).format(words, table, condition, *[sql.Identifier(tie), sql.Literal(k), sql.Identifier(tie)]), [*given, *values]


def condition_of(where: Condition | None) -> Words:
    """A WHERE clause, or nothing."""
    if where is None:
        return sql.SQL(""), []
    words, values = _said(where)
    return sql.SQL("WHERE {}").format(words), values


def _said(where: Condition) -> Words:
    """Unknown counts as false: `IS NOT TRUE` wherever the opposite is meant."""
    match where:
        case Every(parts) | Either(parts):
            said = [_said(part) for part in parts]
            word = sql.SQL(" AND " if isinstance(where, Every) else " OR ")
            return sql.SQL("({})").format(word.join(words for words, _ in said)), [v for _, vs in said for v in vs]
        case Unless(part):
            words, values = _said(part)
            return sql.SQL("({} IS NOT TRUE)").format(words), values
        case Compare(name, "!=", value):
            return _said(Unless(Compare(name, "=", value)))
        case Compare(name, "not_in", value):
            return _said(Unless(Compare(name, "in", value)))
        case Compare(name, "in", value):
            return _said(Either(tuple(Compare(name, "=", one) for one in value))) if value else (sql.SQL("false"), [])
        case Compare(name, "=", None):
            return sql.SQL("(coalesce(jsonb_typeof(metadata -> %s), 'null') = 'null')"), [name]
        case Compare(name, "=", value):
            return _equals(name, value)
        case Compare(name, operator, value):
            return _ordered(name, operator, value)


def _equals(name: str, value: Any) -> Words:
    """By containment, which a GIN index on the metadata answers. True and 1 are equal, as everywhere."""
    same = [value] if isinstance(value, str) else [value, *([bool(value)] if value in (0, 1) else [])]
    if isinstance(value, bool):
        same = [int(value), value]
    words = sql.SQL(" OR ").join([sql.SQL("metadata @> %s")] * len(same))
    return sql.SQL("({})").format(words), [Jsonb({name: one}) for one in same]


def _ordered(name: str, operator: str, value: Any) -> Words:
    if isinstance(value, str):
        # Code points, as everywhere, not the server's language.
        return sql.SQL(
            "(CASE jsonb_typeof(metadata -> %s) WHEN 'string' THEN metadata ->> %s END COLLATE \"C\" {} %s)"
        ).format(sql.SQL(operator)), [name, name, value]
    return sql.SQL(
        "(CASE jsonb_typeof(metadata -> %s) WHEN 'number' THEN (metadata ->> %s)::numeric "
        "WHEN 'boolean' THEN (metadata ->> %s)::boolean::int::numeric END {} %s::text::numeric)"
    ).format(sql.SQL(operator)), [name, name, name, repr(int(value) if isinstance(value, bool) else value)]


def copy_rows(
    keys: Sequence[str], units_ND: Float32s, documents: Sequence[str | None], metadata: Sequence[str | None], store: str
) -> Iterator[bytes]:
    """The rows (id, document, metadata, vector) as blocks of PostgreSQL's binary COPY format.

    A vector is its number of dimensions, two bytes of nothing, and its numbers, all big-endian (pgvector's
    `vector_send` and `halfvec_send`); jsonb is a version byte and the text.
    """
    wide = units_ND.astype(SENT_AS[store])
    size = 4 + wide.shape[1] * wide.itemsize
    head = struct.pack("!ihh", size, wide.shape[1], 0)
    block = bytearray(COPY_HEADER)
    for key, document, fields, row in zip(keys, documents, metadata, wide, strict=True):
        block += b"\0\4"
        for text, lead in ((key, b""), (document, b""), (fields, b"\1")):
            if text is None:
                block += b"\xff\xff\xff\xff"
            else:
                data = lead + text.encode()
                block += struct.pack("!i", len(data)) + data
        block += head + row.tobytes()
        if len(block) >= SENT:
            yield bytes(block)
            block.clear()
    yield bytes(block + COPY_END)


def read_vector(text: str) -> Float32s:
    """A vector from pgvector's text."""
    return np.array(text.strip("[]").split(","), dtype=np.float32)
