"""`Client` and `AsyncClient`: the same calls over HTTP, with and without `await`."""

import asyncio
import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from matryo.clients.wire import Ask, Found, Pause, Reply, Steps, Talk, embed_fields, items_of, texts_of
from matryo.core.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import httpx2

ADDRESS = "http://127.0.0.1:8000"
URL, KEY = "MATRYO_URL", "MATRYO_API_KEY"
"""Environment variables for what is not given."""

Got = TypeVar("Got")


class _Caller:
    """What both clients are: an address, a key inside the connection's headers and nowhere else, a way to talk."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        model: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        transport: Any = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            url: the server's address; MATRYO_URL by default, or port 8000 of this machine.
            key: an API key; MATRYO_API_KEY by default, or none.
            model: what the server calls the model; by default the first it serves.
            timeout: seconds to wait for one answer.
            retries: how often a request is sent again after 429, 503 or a connection that could not be made.
            transport: an httpx2 transport, to talk to an application without a network.

        Raises:
            InputError: an address that is none, a key that no header can carry. MissingExtraError: httpx2 is missing.
        """
        self.url = _address(os.environ.get(URL) or ADDRESS if url is None else url)
        self.model = model
        if isinstance(timeout, bool) or not timeout > 0:
            raise InputError(f"timeout must be seconds above 0, got {timeout!r}")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InputError(f"retries must be a whole number of at least 0, got {retries!r}")
        self.timeout, self._talk = timeout, Talk(self.url, retries, model)
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": _headers(os.environ.get(KEY) or None if key is None else key),
            "timeout": timeout,
            "transport": transport,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, model={self.model!r})"


class Client(_Caller):
    """A server's calls as methods, for any number of threads.

    >>> client = Client("http://127.0.0.1:8000")            # doctest: +SKIP
    >>> client.embed(["a puzzle game"], width=64).shape     # doctest: +SKIP
    (1, 64)
    """

    def __init__(self, url: str | None = None, key: str | None = None, **options: Any) -> None:
        super().__init__(url, key, **options)
        self._http = _httpx2().Client(**self._options)
        del self._options

    def embed(
        self,
        texts: Sequence[str],
        width: int | None = None,
        *,
        depth: int | None = None,
        dtype: str = "float",
        input_type: str | None = None,
        truncate: str | None = None,
    ) -> NDArray[Any]:
        """Encode texts, in as many requests as they need.

        Args:
            texts: N texts, none blank.
            width: leading dimensions to keep, renormalised; all by default.
            depth: layers to run, for models trained at several depths.
            dtype: float, or codes: int8, uint8 (int8 + 128), ubinary (signs packed, first dimension in the highest
                bit), binary (ubinary - 128). Rows have length 1, so int8 codes divided by their length are the vectors.
            input_type: query, document or another prompt of the model.
            truncate: "end" to cut texts that are too long, which are refused otherwise.

        Returns:
            (N, width) float32 unit rows, or (N, width) or (N, width / 8) codes.

        Raises:
            InputError: what is wrong can be seen from here. RefusedError (an InputError): the server refuses it.
            AccessError, UnavailableError, RemoteError: the key, the server or the way to it.
        """
        asked, some = embed_fields(width, depth, dtype, input_type, truncate), texts_of(texts, "texts")
        if not some:
            return np.zeros((0, width or 0), np.float32)
        return self._run(self._talk.embed(self._model(), some, dtype, asked))

    def search(
        self,
        query: str | Sequence[str],
        k: int = 10,
        *,
        plan: str | None = None,
        where: dict[str, Any] | None = None,
        explain: bool = False,
    ) -> Found:
        """The k best items of the server's index for each query, as `Index.search` gives them.

        Args:
            query: a text, or Q texts. One text gives one list of hits.
            plan: how to search, coarse to fine; the index's own plan by default.
            where: a metadata filter.
            explain: say what each stage did, and what recall is promised.

        Raises:
            As `embed`.
        """
        queries, asked = texts_of(query, "query"), _search_fields(k, plan, where, explain)
        return self._run(self._talk.search(queries, asked)) if queries else Found([], [], [], [], plan or "")

    def upsert(
        self, ids: Sequence[str], texts: Sequence[str], metadata: Sequence[dict[str, Any] | None] | None = None
    ) -> int:
        """Write items into the index of a server that is `--writable`; those of the same ids are replaced.

        Each request is one commit of up to 512 items, so after an error the first ones may be there; doing it again
        does no harm.

        Returns:
            How many items were written.

        Raises:
            As `embed`.
        """
        items = items_of(ids, texts, metadata)
        return self._run(self._talk.upsert(items)) if items else 0

    def delete(self, ids: Sequence[str]) -> int:
        """Delete items by id; how many were there."""
        some = texts_of(ids, "ids")
        return self._run(self._talk.delete(some)) if some else 0

    def models(self) -> list[dict[str, Any]]:
        """What the server serves: names, widths, depths, limits, and what each width was measured to keep."""
        return self._run(self._talk.models())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _model(self) -> str:
        if self.model is None:
            self.model = self._run(self._talk.first_model())
        return self.model

    def _run(self, steps: Steps[Got]) -> Got:
        reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                got: Got = end.value
                return got
            reply = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                continue
            try:
                reply = _reply(self._http.send(_request(self._http, step)))
            except _httpx2().RequestError as error:
                reply = _no_reply(error)


class AsyncClient(_Caller):
    """`Client` with `await`. The arguments, answers and errors are the same."""

    def __init__(self, url: str | None = None, key: str | None = None, **options: Any) -> None:
        super().__init__(url, key, **options)
        self._http = _httpx2().AsyncClient(**self._options)
        del self._options

    async def embed(
        self,
        texts: Sequence[str],
        width: int | None = None,
        *,
        depth: int | None = None,
        dtype: str = "float",
        input_type: str | None = None,
        truncate: str | None = None,
    ) -> NDArray[Any]:
        """As `Client.embed`."""
        asked, some = embed_fields(width, depth, dtype, input_type, truncate), texts_of(texts, "texts")
        if not some:
            return np.zeros((0, width or 0), np.float32)
        return await self._run(self._talk.embed(await self._model(), some, dtype, asked))

    async def search(
        self,
        query: str | Sequence[str],
        k: int = 10,
        *,
        plan: str | None = None,
        where: dict[str, Any] | None = None,
        explain: bool = False,
    ) -> Found:
        """As `Client.search`."""
        queries, asked = texts_of(query, "query"), _search_fields(k, plan, where, explain)
        return await self._run(self._talk.search(queries, asked)) if queries else Found([], [], [], [], plan or "")

    async def upsert(
        self, ids: Sequence[str], texts: Sequence[str], metadata: Sequence[dict[str, Any] | None] | None = None
    ) -> int:
        """As `Client.upsert`."""
        items = items_of(ids, texts, metadata)
        return await self._run(self._talk.upsert(items)) if items else 0

    async def delete(self, ids: Sequence[str]) -> int:
        """As `Client.delete`."""
        some = texts_of(ids, "ids")
        return await self._run(self._talk.delete(some)) if some else 0

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return await self._run(self._talk.models())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _model(self) -> str:
        if self.model is None:
            self.model = await self._run(self._talk.first_model())
        return self.model

    async def _run(self, steps: Steps[Got]) -> Got:
        reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                got: Got = end.value
                return got
            reply = None
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                continue
            try:
                reply = _reply(await self._http.send(_request(self._http, step)))
            except _httpx2().RequestError as error:
                reply = _no_reply(error)


def _httpx2() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise MissingExtraError("httpx2", "client", "matryo.Client") from error
    return httpx2


def _address(url: str) -> str:
    """The server's address without a trailing slash or `/v1`. A wrong one is not repeated: it may hold a password."""
    try:
        parts = urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InputError(f"a server's address must be like {ADDRESS}, got another; check url and {URL}")
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError("a server's address must hold no password, query or fragment; give the key as key=...")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def _headers(key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError("the key must be printable ASCII without spaces; check key=... and that nothing was cut off")
    return {"authorization": f"Bearer {key}"}


def _search_fields(k: int, plan: str | None, where: dict[str, Any] | None, explain: bool) -> dict[str, Any]:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k must be a whole number of at least 1, got {k!r}")
    given = {"k": k, "plan": plan, "where": where, "explain": explain or None}
    return {name: value for name, value in given.items() if value is not None}


def _request(http: "httpx2.Client | httpx2.AsyncClient", step: Ask) -> "httpx2.Request":
    if step.body is None:
        return http.build_request("GET", step.path)
    return http.build_request("POST", step.path, content=step.body, headers={"content-type": "application/json"})


def _reply(answer: "httpx2.Response") -> Reply:
    """What came back. Whoever stands in between may repeat the key in a refusal; here it does not go further."""
    body = answer.content
    key = answer.request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if key and answer.is_error:
        body = body.replace(key, b"[key]")
    return Reply(answer.status_code, {name.lower(): value for name, value in answer.headers.items()}, body)


def _no_reply(error: Exception) -> Reply:
    """Why nothing came back. A server that took the request and is only slow is not asked again."""
    httpx2 = _httpx2()
    slow = isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout)
    reason = str(error) or type(error).__name__
    return Reply(0, reason=reason, again=isinstance(error, httpx2.TransportError) and not slow)
