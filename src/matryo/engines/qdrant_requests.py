"""A plan, a filter and a batch in Qdrant's words: plain JSON as its REST interface has it, for every way to reach one.

A collection has the named vector `full` and one per prefix that a plan reads (`p64`, `p256_int8`, `p64_float16_m16`).
The funnel is one request, a chain of nested `prefetch`: the first stage innermost, where the filter stands, and the
exact full-width order outermost.
"""

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matryo.core.errors import InputError
from matryo.core.plan import Plan, Stage
from matryo.core.prefix import truncate
from matryo.index.funnel import Float32s
from matryo.index.where import Compare, Condition, Either, Every, Unless

Json = dict[str, Any]
FULL = "full"
CODES = ("float32", "float16", "int8", "binary")
QUANTISED: dict[str, Json] = {
    "int8": {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}},
    "binary": {"binary": {"always_ram": True}},
}
"""As Qdrant's guide has them: codes in memory, and the vectors that they stand for on the disk."""
LINKS = 16
"""Of a graph whose plan does not say."""
NAME = re.compile(r"p(?P<width>[0-9]+)(?:_(?P<code>float16|int8|binary))?(?:_m(?P<links>[0-9]+))?")
NAMESPACE = uuid.NAMESPACE_URL
"""A point's id is the UUIDv5 of the item's id in this namespace."""
NOTE = str(uuid.uuid5(NAMESPACE, ""))
"""Id of the point that holds the note, and no vectors; no item has an empty id."""
EXACT_NUMBERS = 2**53
"""Qdrant compares numbers as float64, which tells integers apart below this."""


@dataclass(frozen=True)
class Prefix:
    """A named vector: the first `width` dimensions, how they are coded, and the links of its graph (0: no graph)."""

    width: int
    code: str = "float32"
    links: int = 0

    @property
    def name(self) -> str:
        """What it is called in the collection, unless it is the full vector."""
        code = "" if self.code == "float32" else f"_{self.code}"
        return f"p{self.width}{code}" + (f"_m{self.links}" if self.links else "")

    @classmethod
    def read(cls, name: str, full: int) -> "Prefix":
        """A prefix from its name."""
        if name == FULL:
            return cls(full)
        found = NAME.fullmatch(name)
        if not found:
            raise InputError(f"{name!r} is not the name of a prefix, such as p64 or p256_int8_m16")
        return cls(int(found["width"]), found["code"] or "float32", int(found["links"] or 0))

    @classmethod
    def of(cls, stage: Stage) -> "Prefix":
        """The one that a stage reads best."""
        return cls(stage.width, stage.code, links_of(stage))

    def serves(self, stage: Stage) -> bool:
        """Whether the stage can read this one: floats lie beside every quantised code, and a scan needs no graph."""
        if stage.width != self.width or (stage.scan == "hnsw" and self.links != links_of(stage)):
            return False
        if stage.code in QUANTISED:
            return self.code == stage.code and (stage.scan == "hnsw" or not self.links)
        return self.code == "float16" if stage.code == "float16" else self.code != "float16"

    def as_json(self, on_disk: bool) -> Json:
        """Its parameters. Unit rows under Dot, which is the cosine; Qdrant's Cosine would normalise once more."""
        links = {"m": self.links} | ({"ef_construct": max(100, 2 * self.links)} if self.links else {})
        found: Json = {
            "size": self.width,
            "distance": "Dot",
            "datatype": "float16" if self.code == "float16" else "float32",
            "on_disk": on_disk or self.code in QUANTISED,
            "hnsw_config": links,
        }
        return found | ({"quantization_config": QUANTISED[self.code]} if self.code in QUANTISED else {})


Vectors = dict[str, Prefix]
"""Name -> prefix, `full` among them."""


def links_of(stage: Stage) -> int:
    """M of a stage's graph; 0 for a scan of every row."""
    return dict(stage.options).get("M", LINKS) if stage.scan == "hnsw" else 0


def read_vectors(names: Iterable[str], full: int) -> Vectors:
    """`full`, and the prefixes of these names."""
    return {FULL: Prefix(full)} | {name: Prefix.read(name, full) for name in names}


def serving(stage: Stage, vectors: Vectors) -> str | None:
    """Name of the vector that a stage reads; None where the collection has none."""
    return next((name for name, prefix in vectors.items() if prefix.serves(stage)), None)


def lacking(plan: Plan, vectors: Vectors) -> list[str]:
    """Names of the prefixes that a plan reads and the collection lacks."""
    there = dict(vectors)
    for stage in plan.stages:
        if serving(stage, there) is None:
            made = Prefix.of(stage)
            there[made.name] = made
    return [name for name in there if name not in vectors]


def configs(vectors: Vectors) -> Json:
    """Name -> parameters. Full vectors lie on the disk where others are searched before them."""
    return {name: prefix.as_json(name == FULL and len(vectors) > 1) for name, prefix in vectors.items()}


def point_id(key: str) -> str:
    """The id of an item's point."""
    return str(uuid.uuid5(NAMESPACE, key))


def points(
    keys: Sequence[str],
    units_ND: Float32s,
    documents: Sequence[str | None],
    metadata: Sequence[str | None],
    vectors: Vectors,
    row: int,
) -> list[Json]:
    """Items as points; the order of writing is kept as `row`, from this one on."""
    cut = prefixes(units_ND, vectors)
    return [
        {
            "id": point_id(key),
            "vector": {name: rows[n].tolist() for name, rows in cut.items()},
            "payload": {"id": key, "row": row + n, "document": documents[n]} | _fields(fields),
        }
        for n, (key, fields) in enumerate(zip(keys, metadata, strict=True))
    ]


def _fields(text: str | None) -> Json:
    """Metadata as it is and, beside it, its true and false as the numbers that filters compare them as."""
    if text is None:
        return {"metadata": None}
    fields: Json = json.loads(text)
    flags = {name: int(value) for name, value in fields.items() if isinstance(value, bool)}
    return {"metadata": fields} | ({"flags": flags} if flags else {})


def prefixes(units_ND: Float32s, vectors: Vectors) -> dict[str, Float32s]:
    """Name -> (N, width) unit rows, cut here, so that all are of the same rows."""
    widths = {prefix.width: truncate(units_ND, prefix.width) for prefix in vectors.values()}
    return {name: units_ND if name == FULL else widths[prefix.width] for name, prefix in vectors.items()}


def note_point(text: str) -> Json:
    """The note as a point without vectors, which no search finds."""
    return {"id": NOTE, "vector": {}, "payload": {"matryo": text}}


def funnel(plan: Plan, query_D: Float32s, k: int, limit: int, where: Condition | None, vectors: Vectors) -> Json:
    """One request that answers one query by a plan whose every stage some vector serves, best first.

    Args:
        k: shortlists are no shorter than this.
        limit: answers that come back.
    """
    full = vectors[FULL].width
    inner: Json = {} if where is None else {"filter": condition_of(where)}
    stages = list(plan.stages)
    if stages[-1].width == full and stages[-1].code == "float32" and stages[-1].scan == "flat":
        stages.pop()  # the exact order is this stage
    for stage in stages:
        name = serving(stage, vectors)
        assert name is not None
        keep = max(k, stage.keep or k)
        request: Json = {"query": _numbers(query_D, stage.width), "using": name, "limit": keep}
        inner = {"prefetch": [request | {"params": _params(stage, vectors[name], keep)} | inner]}
    return _answers(_numbers(query_D, full), FULL, limit) | inner


def by_prefix(name: str, query_D: Float32s, width: int, limit: int, where: Condition | None) -> Json:
    """One request that answers by the exact cosines of the first `width` dimensions alone."""
    filtered = {} if where is None else {"filter": condition_of(where)}
    return _answers(_numbers(query_D, width), name, limit) | filtered


def _answers(query: list[float], name: str, limit: int) -> Json:
    return {"query": query, "using": name, "limit": limit, "params": {"exact": True}, "with_payload": True}


def _numbers(query_D: Float32s, width: int) -> list[float]:
    row = query_D if width == len(query_D) else truncate(query_D[None], width)[0]
    numbers: list[float] = row.tolist()
    return numbers


def _params(stage: Stage, prefix: Prefix, keep: int) -> Json:
    """`exact` reads the floats and no graph. Codes are never rescored inside a stage: the next stage does that."""
    if stage.code in QUANTISED:
        params: Json = {"quantization": {"ignore": False, "rescore": False}}
    elif stage.scan == "flat":
        return {"exact": True}
    else:
        params = {"quantization": {"ignore": True}} if prefix.code in QUANTISED else {}
    if stage.scan == "hnsw":
        params["hnsw_ef"] = max(dict(stage.options).get("ef", 0), keep)
    return params


def condition_of(where: Condition) -> Json:
    """A filter over the payload's `metadata`.

    Raises:
        InputError: an order of texts, or a number beyond 2^53, which Qdrant cannot compare.
    """
    match where:
        case Every(parts):
            return {"must": [condition_of(part) for part in parts]}
        case Either(parts):
            return {"should": [condition_of(part) for part in parts]}
        case Unless(part):
            return {"must_not": [condition_of(part)]}
        case Compare(name, "!=", value):
            return condition_of(Unless(Compare(name, "=", value)))
        case Compare(name, "not_in", value):
            return condition_of(Unless(Compare(name, "in", value)))
        case Compare(name, "in", value):
            return _any_of(name, value)
        case Compare(name, "=", None):
            return {"must": [{"is_empty": {"key": path_of(name)}}]}
        case Compare(name, "=", value):
            return _any_of(name, (value,))
        case Compare(name, operator, value):
            return _ordered(name, operator, value)


def path_of(name: str, part: str = "metadata") -> str:
    """Where a metadata field lies in the payload."""
    return f'{part}."{name}"'


def lack(names: Iterable[str]) -> Json:
    """A filter for the items without one of these vectors."""
    without: list[Json] = [{"must_not": [{"has_vector": name}]} for name in names]
    return {"should": without, "must_not": [{"has_id": [NOTE]}]}


def kinds_of(points: Iterable[Json]) -> dict[str, str]:
    """Path of a field -> the index over its values, keyword or float; fields of mixed values get none."""
    found: dict[str, set[str]] = {}
    for point in points:
        for part in ("metadata", "flags"):
            for name, value in (point["payload"].get(part) or {}).items():
                if isinstance(value, str | float | int) and not isinstance(value, bool):
                    kind = "keyword" if isinstance(value, str) else "float"
                    found.setdefault(path_of(name, part), set()).add(kind)
    return {path: kinds.pop() for path, kinds in found.items() if len(kinds) == 1}


def _any_of(name: str, values: Sequence[Any]) -> Json:
    """Equal to one of the values."""
    path = path_of(name)
    texts = [value for value in values if isinstance(value, str)]
    numbers = list(dict.fromkeys(_number(name, value) for value in values if not isinstance(value, str)))
    found: list[Json] = [{"key": path, "match": {"any": texts}}] if len(texts) > 1 else []
    found += [{"key": path, "match": {"value": text}} for text in texts] if len(texts) == 1 else []
    for number in numbers:
        found += _within(name, {"gte": number, "lte": number}, number in (0, 1))
    return {"should": found} if found else {"must": [{"has_id": []}]}


def _ordered(name: str, operator: str, value: Any) -> Json:
    if isinstance(value, str):
        raise InputError(
            f"where[{name!r}]: Qdrant has no order of texts; compare them by = != in not_in, or keep what is to be "
            "ordered as a number"
        )
    number = _number(name, value)
    word = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[operator]
    return {"should": _within(name, {word: number}, True)}


def _within(name: str, limits: Json, flags: bool) -> list[Json]:
    """Numbers in a range, which 1 and 1.0 are alike in, and true and false where they may be in it."""
    parts = ("metadata", "flags") if flags else ("metadata",)
    return [{"key": path_of(name, part), "range": limits} for part in parts]


def _number(name: str, value: Any) -> float:
    if abs(value) >= EXACT_NUMBERS:
        raise InputError(
            f"where[{name!r}]: Qdrant compares numbers as float64, exactly below 2^53, got {value}; keep larger "
            "numbers as text and compare them by = != in not_in"
        )
    return float(value)
