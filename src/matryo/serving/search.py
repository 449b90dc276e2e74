"""`POST /v1/search`: texts or a vector in, items of an index out, coarse to fine or by a prefix alone."""

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.plan import Plan
from matryo.index import Hits, Index
from matryo.index.codes import held_as
from matryo.index.where import compile_where
from matryo.serving.door import Answer, as_json
from matryo.serving.engines import Choice
from matryo.serving.errors import ApiError, invalid
from matryo.serving.fields import (
    Allowed,
    Fields,
    check_texts,
    integer,
    kind,
    read_json,
    read_model,
    read_width,
    refuse_unknown,
    text,
)
from matryo.serving.items import Changes
from matryo.serving.service import Call, Service

Float32s = NDArray[np.float32]

FIELDS = frozenset({"model", "query", "vector", "dimensions", "k", "plan", "where", "explain", "user"})
MOST_HITS = 1000
MOST_CONDITIONS = 200
MOST_WAITING = 256
"""Searches that may wait for a thread; beyond, callers are told to come back."""
THREADS = 2

log = logging.getLogger("matryo.serving")


class Searcher:
    """An open index, searched in threads of its own. New commits are seen at the next search."""

    def __init__(self, folder: str, choice: Choice, writable: bool = False) -> None:
        """Open it.

        Raises:
            InputError: no index there, or another model made its vectors. DamagedError: it cannot be read safely.
            LockedError: it is to be written, and another process has it open for that.
        """
        self.index = Index.open(folder, read_only=not writable)
        self.changes = Changes() if writable else None
        try:
            stats = self.index.stats()
            _same_model(folder, stats, choice)
        except BaseException:
            self.index.close()
            raise
        self.plan = str(stats["plan"])
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="matryo-search")
        self._waiting = 0

    async def search(self, queries_QD: Float32s, **options: Any) -> Hits:
        """`Index.search` in a thread.

        Raises:
            ApiError: 400 for a plan that this index cannot run, 429 when too many searches wait.
        """
        if self._waiting >= MOST_WAITING:
            raise ApiError(429, "Too many searches are waiting.", code="overloaded", retry_after=1)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: self.index.search(queries_QD, **options)
            )
        except InputError as error:
            raise invalid("plan", str(error)) from error
        finally:
            self._waiting -= 1

    async def described(self) -> dict[str, Any]:
        """Facts of the index, none of which name a place on the disk."""
        stats = await asyncio.get_running_loop().run_in_executor(self._threads, self.index.stats)
        kept = ("items", "width", "plan", "promise", "store", "bytes_per_item")
        return {name: stats[name] for name in kept} | {"plan_bytes_per_item": _held(stats)}

    def close(self) -> None:
        """Let searches and changes that run finish, and close the index."""
        if self.changes is not None:
            self.changes.close()
        self._threads.shutdown()
        self.index.close()


def _same_model(folder: str, stats: dict[str, Any], choice: Choice) -> None:
    """Vectors of another model would be searched without a word and find nothing; refuse them."""
    recorded = stats["model"]
    if stats["width"] != choice.engine.width:
        raise InputError(
            f"{folder} holds vectors of width {stats['width']} and the model gives {choice.engine.width}; serve the "
            "model that made them"
        )
    if not recorded:
        log.warning("the index does not say which model made its vectors", extra={"fields": {"index": folder}})
    elif recorded.get("blake2b") != choice.digest:
        raise InputError(
            f"{folder} was built by another model ({recorded.get('name')}); serve that one, or build the index again"
        )


def _held(stats: dict[str, Any]) -> float | None:
    """Bytes an item of the codes that the index's own plan keeps in memory, where they are loaded."""
    names, loaded = [], stats["bytes_per_item"]
    for n, stage in enumerate(Plan.parse(stats["plan"]).stages):
        from_the_disk = stage.code in ("float32", stats["store"]) if n else str(stage) == f"{stats['width']}:float32"
        if not from_the_disk:
            names.append(f"{stage.width}:{held_as(stage, first=n == 0)}")
    return sum(loaded[name] for name in names) if all(name in loaded for name in names) else None


async def search(service: Service, call: Call) -> Answer:
    """The best items for each query, with what each stage did if asked to explain."""
    searcher = service.searcher
    if searcher is None:
        raise ApiError(404, "This server has no index; it was started without --index.", code="no_index")
    fields = read_json(call.body)
    asked, options = read_search(fields, service.allowed)
    width = options["width"]
    if isinstance(asked, np.ndarray):
        queries, call.width = asked, service.engine.width
    else:
        call.texts = asked
        prompt = "query" if "query" in service.allowed.prompts else None
        inputs = service.fitted(await service.tokens(asked, prompt), False, "query")
        queries = await service.encode(call, inputs, service.engine.width, "query")
    began = time.monotonic()
    hits = await searcher.search(queries, **options)
    call.timing["search"] = time.monotonic() - began
    data = [{"object": "hits", "index": n, "hits": _listed(hits, n)} for n in range(len(hits))]
    usage = {"prompt_tokens": call.tokens, "total_tokens": call.tokens}
    model = fields.get("model") or service.allowed.names[0]
    plan = f"{width}:float32" if width else options["plan"] or searcher.plan
    found = {"object": "list", "data": data, "model": model, "plan": plan, "usage": usage}
    if options["explain"]:
        stages = [asdict(stage) for stage in hits.explanation or ()]
        found |= {"explanation": stages, "promise": getattr(hits, "promise", None)}
    return as_json(found)


def read_search(fields: Fields, allowed: Allowed) -> tuple[list[str] | Float32s, dict[str, Any]]:
    """Texts, or (1, D) numbers in their place, and what `Index.search` is to be told; all checked but the filter's
    columns and the plan's fit, which the index knows.
    """
    refuse_unknown(fields, FIELDS)
    if fields.get("model") is not None:
        read_model(fields, allowed)
    text(fields, "user", None)
    asked = _vector(fields, allowed.width) if fields.get("vector") is not None else _texts(fields, allowed)
    width = None if fields.get("dimensions") is None else read_width({"dimensions": fields["dimensions"]}, allowed)
    if width is not None and fields.get("plan") is not None:
        raise invalid("plan", "'dimensions' is a search without a plan; give one of the two.", "conflict")
    k = 10 if fields.get("k") is None else integer("k", fields["k"], 1, MOST_HITS)
    explain = fields.get("explain")
    if explain is not None and not isinstance(explain, bool):
        raise invalid("explain", f"'explain' must be true or false, got {kind(explain)}.")
    plan, where = text(fields, "plan", None), fields.get("where")
    try:
        if plan is not None:
            Plan.parse(plan)
    except InputError as error:
        raise invalid("plan", str(error)) from error
    if where is not None:
        _check_where(where)
    return asked, {"k": k, "plan": plan, "where": where, "explain": bool(explain), "width": width}


def _texts(fields: Fields, allowed: Allowed) -> list[str]:
    query = fields.get("query")
    queries: Sequence[object] = [query] if isinstance(query, str) else query if isinstance(query, list) else ()
    if not queries:
        raise invalid("query", "The field 'query' is required: a text, or a list of texts.")
    if len(queries) > allowed.max_inputs:
        raise invalid("query", f"'query' has {len(queries)} entries; at most {allowed.max_inputs} are allowed.")
    return check_texts(queries, "query")


def _vector(fields: Fields, width: int) -> Float32s:
    """(1, D) from what /v1/embeddings gave for a query: numbers, or their base64."""
    if fields.get("query") is not None:
        raise invalid("vector", "'vector' is a query that is encoded already; give it or 'query'.", "conflict")
    value, right = fields["vector"], f"'vector' must be {width} numbers, or the base64 of as many float32."
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid("vector", right) from error
        if len(data) != 4 * width:
            raise invalid("vector", right)
        row = np.frombuffer(data, "<f4").astype(np.float32)
    else:
        numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
        if not numbers or len(value) != width:
            raise invalid("vector", right)
        with np.errstate(over="ignore"):
            row = np.array(value, np.float64).astype(np.float32)
    if not np.isfinite(row).all() or not row.any():
        raise invalid("vector", "'vector' must hold finite numbers of float32, not all of them zero.")
    return row[None]


def _check_where(where: object) -> None:
    if _conditions(where) > MOST_CONDITIONS:
        raise invalid("where", f"'where' has more than {MOST_CONDITIONS} conditions; use \"in\" with a list of values.")
    try:
        compile_where(where)
    except InputError as error:
        raise invalid("where", str(error)) from error


def _conditions(where: object) -> int:
    if isinstance(where, dict):
        return sum(map(_conditions, where.values())) or 1
    if isinstance(where, list) and any(isinstance(one, dict) for one in where):
        return sum(map(_conditions, where))
    return 1


def _listed(hits: Hits, n: int) -> list[dict[str, Any]]:
    rows = zip(hits.ids[n], hits.scores[n], hits.documents[n], hits.metadata[n], strict=True)
    return [{"id": key, "score": score, "document": words, "metadata": more} for key, score, words, more in rows]
