"""`POST /v1/items` and `/v1/items/delete`: texts into the index and out of it, where the operator allows it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from matryo.core.errors import InputError
from matryo.index import Index
from matryo.index.items import check_ids, check_metadata
from matryo.serving.door import Answer, as_json
from matryo.serving.errors import ApiError, invalid
from matryo.serving.fields import Fields, check_texts, kind, read_json, refuse_unknown
from matryo.serving.service import Call, Service

ITEM = frozenset({"id", "text", "metadata"})
IDS = "ids must be distinct texts that are not empty and hold no NUL"
METADATA = "metadata must be one flat object of texts without NUL, 64-bit numbers, booleans and null"
MOST_WAITING = 64
"""Batches that may wait to be written; beyond, callers are told to come back."""


class Changes:
    """Writes to an index, one after the other in a thread of their own, so that searches go on beside them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="matryo-write")
        self._waiting = 0

    async def run(self, change: Callable[[], int]) -> int:
        """One change. When it is back it is committed, whatever happens to the process next.

        Raises:
            ApiError: 429 when too many wait. StorageError: nothing was changed.
        """
        if self._waiting >= MOST_WAITING:
            raise ApiError(429, "Too many changes are waiting.", code="overloaded", retry_after=1)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, change)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Let what was accepted be written."""
        self._thread.shutdown()


async def upsert(service: Service, call: Call) -> Answer:
    """Encode texts and write them as whole items, replacing those of the same ids. One request is one commit."""
    ids, texts, metadata = read_items(read_json(call.body), service.allowed.max_inputs)
    call.texts = texts
    inputs = service.fitted(await service.tokens(texts, None), False, "items")
    rows = await service.encode(call, inputs, service.engine.width, "items")
    written = await _changed(service, lambda index: index.upsert(ids, rows, texts, metadata))
    usage = {"prompt_tokens": call.tokens, "total_tokens": call.tokens}
    return as_json({"object": "items", "written": written, "usage": usage})


async def delete(service: Service, call: Call) -> Answer:
    """Delete items by id; ids that are not there are no error."""
    fields = read_json(call.body)
    refuse_unknown(fields, frozenset({"ids"}))
    ids = _some(fields, "ids", service.allowed.max_inputs)
    _fits("ids", IDS, lambda: check_ids(ids))
    deleted = await _changed(service, lambda index: index.delete(ids))
    return as_json({"object": "items", "deleted": deleted})


def read_items(fields: Fields, most: int) -> tuple[list[str], list[str], list[dict[str, Any] | None]]:
    """Ids, texts and metadata of a request, checked as the index checks them."""
    refuse_unknown(fields, frozenset({"items"}))
    items = _some(fields, "items", most)
    for n, one in enumerate(items):
        if not isinstance(one, dict):
            raise invalid(f"items[{n}]", f"'items[{n}]' must be an object, got {kind(one)}.")
        if not ITEM >= one.keys() >= {"id", "text"}:
            raise invalid(f"items[{n}]", f"'items[{n}]' must have 'id' and 'text', and may have 'metadata'.")
    texts = check_texts([one["text"] for one in items], "items")
    ids, metadata = [one["id"] for one in items], [one.get("metadata") for one in items]
    _fits("items", IDS, lambda: check_ids(ids))
    for n, one in enumerate(metadata):
        if one is not None and not isinstance(one, dict):
            raise invalid(f"items[{n}]", f"'items[{n}].metadata' must be an object, got {kind(one)}.")
        _fits(f"items[{n}]", METADATA, partial(check_metadata, [one], 1))
    return ids, texts, metadata


def _some(fields: Fields, name: str, most: int) -> list[Any]:
    found = fields.get(name)
    if not isinstance(found, list) or not found:
        raise invalid(name, f"The field '{name}' is required: a list that is not empty.", "missing_field")
    if len(found) > most:
        raise invalid(name, f"'{name}' has {len(found)} entries; at most {most} are allowed.", "too_many_inputs")
    return found


def _fits(param: str, rule: str, check: Callable[[], object]) -> None:
    """Run a check of the index; its own words would repeat what was sent."""
    try:
        check()
    except InputError as error:
        raise invalid(param, f"'{param}': {rule}.") from error


async def _changed(service: Service, change: Callable[[Index], int]) -> int:
    searcher = service.searcher
    if searcher is None or searcher.changes is None:
        raise RuntimeError("these paths are there only where the index may be changed")
    index = searcher.index
    return await searcher.changes.run(lambda: change(index))
