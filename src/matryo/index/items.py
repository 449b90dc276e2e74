"""What a caller hands in besides vectors: ids, documents, metadata. Checked whole before anything is written."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matryo.core.errors import InputError

Metadata = dict[str, Any]
LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Batch:
    """Items for `Index.extend`, as `Index.upsert` takes them."""

    ids: Sequence[str]
    vectors: Any
    documents: Sequence[str | None] | None = None
    metadata: Sequence[Metadata | None] | None = None
    read: int | None = None
    """Rows of the source that were read for it, where those are more than its items."""


def check_ids(ids: object) -> list[str]:
    """A list of distinct, non-empty, storable ids, or an InputError that names the first bad position."""
    checked = read_ids(ids)
    if len(set(checked)) != len(checked):
        seen: set[str] = set()
        for n, key in enumerate(checked):
            if key in seen:
                raise InputError(f"ids[{n}] {key!r} is twice in this batch; keep one row per id")
            seen.add(key)
    return checked


def read_ids(ids: object) -> list[str]:
    """A list of non-empty ids; the same one may come twice (deleting is the same once or twice)."""
    if isinstance(ids, (str, bytes)) or (not isinstance(ids, Sequence) and not hasattr(ids, "__iter__")):
        raise InputError(f"ids must be a list of texts, got {type(ids).__name__}; for one item write [id]")
    checked = list(ids)
    for n, key in enumerate(checked):
        if not isinstance(key, str) or not key:
            raise InputError(f"ids[{n}] must be a non-empty text, got {key!r}; write str(id) for numbers")
        _storable(key, f"ids[{n}]")
        if "\0" in key:
            raise InputError(f"ids[{n}] holds a NUL character; remove it")
    return checked


def check_documents(documents: Sequence[str | None] | None, n: int) -> list[str | None]:
    """One text or None per item."""
    if documents is None:
        return [None] * n
    if isinstance(documents, str) or len(documents) != n:
        raise InputError(f"documents must be one text (or None) per id: {n} ids, {_count(documents)}")
    for place, text in enumerate(documents):
        if text is not None:
            if not isinstance(text, str):
                raise InputError(f"documents[{place}] must be text or None, got {type(text).__name__}")
            _storable(text, f"documents[{place}]")
    return list(documents)


def check_metadata(metadata: Sequence[Metadata | None] | None, n: int) -> list[str | None]:
    """One flat JSON object (as text) or None per item."""
    if metadata is None:
        return [None] * n
    if isinstance(metadata, (str, dict)) or len(metadata) != n:
        raise InputError(f"metadata must be one dict (or None) per id: {n} ids, {_count(metadata)}")
    return [None if fields is None else _fields(fields, f"metadata[{place}]") for place, fields in enumerate(metadata)]


def check_field(name: object, where: str) -> str:
    """A metadata field name that a JSON path can quote."""
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: field names must be non-empty texts, got {name!r}")
    _storable(name, where)
    if '"' in name or "\\" in name or any(ord(c) < 32 for c in name):
        raise InputError(f"{where}: field {name!r} holds a quote, a backslash or a control character; rename it")
    return name


def check_scalar(value: object, where: str) -> Any:
    """A text, finite number, bool or None that SQLite holds exactly."""
    if isinstance(value, str):
        _storable(value, where)
        if "\0" in value:
            raise InputError(f"{where} holds a NUL character; remove it")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{where} is {value}; JSON has no NaN or Inf, leave the field out or use None")
    elif isinstance(value, int):
        if abs(value) > LARGEST_INTEGER:
            raise InputError(f"{where} is beyond 64 bits; store it as text")
    elif value is not None:
        raise InputError(f"{where} must be text, a number, true, false or None, got {type(value).__name__}")
    return value


def item_digest(row: int, key: str, document: str | None, metadata: str | None) -> bytes:
    """BLAKE2b-128 over everything the catalogue says about one row; SQLite itself does not checksum its pages."""
    text, fields = document or "", metadata or ""
    kinds = (document is not None) + 2 * (metadata is not None)
    whole = f"{row}:{kinds}:{len(key)}:{len(text)}:{key}{text}{fields}"
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()


def _fields(fields: object, where: str) -> str:
    if not isinstance(fields, dict):
        raise InputError(f"{where} must be a dict or None, got {type(fields).__name__}")
    for name, value in fields.items():
        check_scalar(value, f"{where}[{check_field(name, where)!r}]")
    return json.dumps(fields, ensure_ascii=False, allow_nan=False)


def _storable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds a lone surrogate, which is not valid text") from error


def _count(values: object) -> str:
    return f"got {len(values)}" if isinstance(values, list | tuple) else f"got {type(values).__name__}"
