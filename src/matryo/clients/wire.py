"""What is said to a server and what its answers mean, without a connection: steps that a sync or async caller takes.

Each function that talks is a generator. It yields an `Ask` (send this, give me the `Reply`) or a `Pause` (wait so many
seconds), and returns what the caller wanted.
"""

import base64
import binascii
import email.utils
import json
import random
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import AccessError, InputError, RefusedError, RemoteError, UnavailableError
from matryo.core.prefix import check_width
from matryo.core.records import check_texts

DTYPES = {"float": "<f4", "int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}
"""What `output_dtype` calls each code, and the numbers it is sent as."""
MOST_TEXTS = 512
MOST_BYTES = 256_000
"""Of one request's texts: a server's limits on bodies (4 MiB) and tokens (300,000) lie beyond, whatever they are."""
REPEATABLE = (429, 503)
LONGEST_WAIT = 60.0
"""Seconds. A server that asks for more has its refusal handed to the caller at once."""
FIRST_WAIT = 0.25


@dataclass(frozen=True)
class Ask:
    """One request: GET without a body, POST with one."""

    path: str
    body: bytes | None = None


@dataclass(frozen=True)
class Pause:
    """Seconds to wait."""

    seconds: float


@dataclass(frozen=True)
class Reply:
    """An answer; or, with status 0, why there was none and whether asking again is any use."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reason: str = ""
    again: bool = False


@dataclass(frozen=True)
class Found:
    """Answers of a search, one list per query, best first, as `Index.search` gives them."""

    ids: list[list[str]]
    scores: list[list[float]]
    """Full-width cosines."""
    documents: list[list[str | None]]
    metadata: list[list[dict[str, Any] | None]]
    plan: str
    """The plan that ran."""
    explanation: list[dict[str, Any]] | None = None
    """What each stage did, with `explain=True`."""
    promise: str | None = None

    def __len__(self) -> int:
        return len(self.ids)


Got = TypeVar("Got")
Steps = Generator[Ask | Pause, Reply | None, Got]


def ask(path: str, content: dict[str, Any] | None, retries: int, where: str) -> Steps[Any]:
    """The JSON of a good answer, asked for again where the server said "later" or could not be reached.

    Raises:
        RefusedError, AccessError, UnavailableError, RemoteError: by what the last answer said.
    """
    try:
        body = None if content is None else json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the request cannot be written as JSON ({error})") from error
    for left in range(retries, -1, -1):
        reply = yield Ask(path, body)
        assert reply is not None
        if 200 <= reply.status < 300:
            return parsed(reply, where)
        pause = delay(reply, retries - left)
        if not left or pause is None:
            raise failure(reply, where)
        yield Pause(pause)
    raise AssertionError("unreachable")


def delay(reply: Reply, tried: int) -> float | None:
    """Seconds until it may be asked again, or None where asking again would not help.

    What the server says in `retry-after`, else a quarter of a second, doubled each time, with chance in it so that
    callers that were refused together do not come back together.
    """
    headers = reply.headers
    if not (reply.again or (reply.status in REPEATABLE and headers.get("x-should-retry") != "false")):
        return None
    asked = _seconds(headers.get("retry-after", ""))
    if asked is None:
        return FIRST_WAIT * 2.0**tried * random.uniform(0.5, 1)
    return asked if asked <= LONGEST_WAIT else None


def _seconds(text: str) -> float | None:
    """Of a `retry-after`, which is a number of seconds or a date."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def failure(reply: Reply, where: str) -> RemoteError:
    """The error that an answer stands for, with the server's own words where it has some."""
    if reply.status == 0:
        return UnavailableError(f"{where} gave no answer ({reply.reason}); check the address and that it runs")
    said: Any = {}
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        said = json.loads(reply.body)["error"]
    if not isinstance(said, dict):
        said = {"message": str(said)}
    words = said.get("message") or "no reason given"
    facts: dict[str, Any] = {
        "status": reply.status,
        "code": said.get("code"),
        "param": said.get("param"),
        "request": reply.headers.get("x-request-id"),
    }
    text = f"{where} answered {reply.status}: {words}"
    if reply.status in (401, 403):
        return AccessError(f"{text} Give another key: key=... or MATRYO_API_KEY", **facts)
    if reply.status in (408, *REPEATABLE):
        return UnavailableError(text, **facts)
    if 400 <= reply.status < 500:
        return RefusedError(text, **facts)
    number = f" (request {facts['request']})" if facts["request"] else ""
    return RemoteError(text + number, **facts)


def parsed(reply: Reply, where: str) -> Any:
    """The JSON object of an answer."""
    try:
        found = json.loads(reply.body)
    except (ValueError, RecursionError) as error:
        raise strange(where, "its answer is not JSON") from error
    if not isinstance(found, dict):
        raise strange(where, "its answer is no object")
    return found


def strange(where: str, what: str) -> RemoteError:
    """An answer that is no answer to what was asked."""
    return RemoteError(f"{where} does not answer as an embeddings server does: {what}; check that the address is right")


@dataclass(frozen=True)
class Talk:
    """Whom to ask, how often, for which model: everything of a client but its connection."""

    where: str
    retries: int
    model: str | None

    def models(self) -> Steps[list[dict[str, Any]]]:
        """What the server serves."""
        found = yield from ask("/v1/models", None, self.retries, self.where)
        listed = found.get("data")
        if not isinstance(listed, list) or not all(isinstance(one, dict) and "id" in one for one in listed):
            raise strange(self.where, "it lists no models")
        return listed

    def first_model(self) -> Steps[str]:
        """The model to ask for: the one given, or the first that is served."""
        if self.model is not None:
            return self.model
        listed = yield from self.models()
        if not listed:
            raise strange(self.where, "it serves no model")
        return str(listed[0]["id"])

    def embed(self, model: str, texts: list[str], dtype: str, asked: dict[str, Any]) -> Steps[NDArray[Any]]:
        """(N, ...) rows for N texts, asked for in as many requests as they need."""
        rows = []
        for some in batches(texts):
            content = {"model": model, "input": some, "encoding_format": "base64", **asked}
            found = yield from ask("/v1/embeddings", content, self.retries, self.where)
            rows.append(decoded(found, len(some), dtype, asked.get("dimensions"), self.where))
        if len({one.shape[1] for one in rows}) > 1:
            raise strange(self.where, "the vectors of two requests have different widths")
        return np.concatenate(rows)

    def search(self, queries: list[str], asked: dict[str, Any]) -> Steps[Found]:
        """Hits for each query, asked for in as many requests as they need."""
        parts = []
        for some in batches(queries):
            found = yield from ask("/v1/search", {"query": some, **asked}, self.retries, self.where)
            parts.append(_found(found, len(some), self.where))
        whole = parts[0]
        for part in parts[1:]:
            for name in ("ids", "scores", "documents", "metadata"):
                getattr(whole, name).extend(getattr(part, name))
        return whole

    def upsert(self, items: list[dict[str, Any]]) -> Steps[int]:
        """Items written, in as many requests as they need."""
        written = start = 0
        for some in batches([item["text"] for item in items]):
            content = {"items": items[start : start + len(some)]}
            found = yield from ask("/v1/items", content, self.retries, self.where)
            written, start = written + _counted(found, "written", self.where), start + len(some)
        return written

    def delete(self, ids: list[str]) -> Steps[int]:
        """Items deleted, in as many requests as they need."""
        deleted = 0
        for some in batches(ids):
            found = yield from ask("/v1/items/delete", {"ids": some}, self.retries, self.where)
            deleted += _counted(found, "deleted", self.where)
        return deleted


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Texts in order, at most `MOST_TEXTS` and `MOST_BYTES` of them together, a longer one alone."""
    start = size = 0
    for n, text in enumerate(texts):
        length = len(text.encode())
        if n > start and (n - start == MOST_TEXTS or size + length > MOST_BYTES):
            yield texts[start:n]
            start, size = n, 0
        size += length
    yield texts[start:]


def decoded(found: dict[str, Any], count: int, dtype: str, width: int | None, where: str) -> NDArray[Any]:
    """(N, ...) rows of an answer, each the numbers that were asked for, in the order of the texts."""
    try:
        rows = sorted(found["data"], key=lambda row: row["index"])
        if [row["index"] for row in rows] != list(range(count)):
            raise strange(where, f"it gave {len(rows)} vectors for {count} texts")
        codes = [_numbers(row["embedding"], DTYPES[dtype]) for row in rows]
        stacked = np.stack(codes)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise strange(where, "its vectors cannot be read") from error
    given = stacked.shape[1] * (8 if "binary" in dtype else 1)
    if width is not None and given != width:
        raise strange(where, f"it gave vectors of width {given} where {width} was asked for")
    return stacked


def _numbers(value: Any, kind: str) -> NDArray[Any]:
    """One row, in base64 as asked for, or as a list, as some servers send it whatever was asked."""
    native = np.dtype(kind).newbyteorder("=")
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), kind).astype(native)
    return np.array(value, native)


def _counted(found: dict[str, Any], name: str, where: str) -> int:
    count = found.get(name)
    if type(count) is not int:
        raise strange(where, f"it does not say how many items were {name}")
    return count


def _found(found: dict[str, Any], count: int, where: str) -> Found:
    try:
        lists = [row["hits"] for row in sorted(found["data"], key=lambda row: row["index"])]
        ids, scores, documents, metadata = (
            [[hit[name] for hit in hits] for hits in lists] for name in ("id", "score", "document", "metadata")
        )
    except (KeyError, TypeError) as error:
        raise strange(where, "its hits cannot be read") from error
    if len(lists) != count:
        raise strange(where, f"it gave {len(lists)} lists of hits for {count} queries")
    plan, explanation, promise = str(found.get("plan", "")), found.get("explanation"), found.get("promise")
    return Found(ids, scores, documents, metadata, plan, explanation, promise)


def embed_fields(
    width: int | None, depth: int | None, dtype: str, input_type: str | None, truncate: str | None
) -> dict[str, Any]:
    """The optional fields of a request for embeddings, only those that say something: other servers know few."""
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    fields: dict[str, Any] = {
        "dimensions": None if width is None else check_width(width, 1 << 20),
        "depth": depth,
        "output_dtype": None if dtype == "float" else dtype,
        "input_type": input_type,
        "truncate": truncate,
    }
    return {name: value for name, value in fields.items() if value is not None}


def items_of(ids: Sequence[str], texts: Sequence[str], metadata: Sequence[Any] | None) -> list[dict[str, Any]]:
    """What /v1/items takes, one object an item; the server checks the rest."""
    keys, words = texts_of(ids, "ids"), texts_of(texts, "texts")
    more = [None] * len(keys) if metadata is None else list(metadata)
    if not len(keys) == len(words) == len(more):
        raise InputError(f"got {len(keys)} ids, {len(words)} texts and {len(more)} metadata; give one of each an item")
    return [{"id": key, "text": text, "metadata": said} for key, text, said in zip(keys, words, more, strict=True)]


def texts_of(texts: Sequence[str] | str, what: str) -> list[str]:
    """A list of texts; for search one text is a list of one."""
    if isinstance(texts, str):
        if what != "query":
            raise InputError(f"{what} must be a list of texts, got one text; put it in a list")
        texts = [texts]
    return check_texts(texts, what)
