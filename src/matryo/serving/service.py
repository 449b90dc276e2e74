"""What every endpoint shares: the model with its batcher, what is allowed, who may call, what is counted."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.prefix import truncate
from matryo.serving.batching import LONGEST_RETRY, Batcher, EncodingError, Job, OverloadedError
from matryo.serving.engines import Choice, Tokens
from matryo.serving.errors import ApiError, internal, invalid
from matryo.serving.fields import Allowed
from matryo.serving.keys import Key, Keys, read_keys
from matryo.serving.metrics import Metrics
from matryo.serving.plans import read_plans
from matryo.serving.settings import Settings

if TYPE_CHECKING:
    from matryo.serving.search import Searcher

Float32s = NDArray[np.float32]
Message = MutableMapping[str, Any]

INLINE_CHARACTERS = 4000
"""Inputs of at most so many characters are tokenised at once; more go to a thread and leave the loop to others."""
STALE = 10.0
"""Seconds after which `/ready` tries an encode of its own."""
PROBE_SECONDS = 5.0


class ClientGoneError(Exception):
    """The caller closed the connection; nobody waits for an answer."""


@dataclass(slots=True)
class Call:
    """One request as an endpoint sees it, and what the log and the metrics are to know of it."""

    number: str
    headers: dict[bytes, bytes]
    path: dict[str, Any]
    receive: Callable[[], Awaitable[Message]]
    began: float
    body: bytes = b""
    key: Key | None = None
    width: int | None = None
    depth: int | None = None
    """Layers that are run; None for all of them."""
    inputs: int = 0
    tokens: int = 0
    timing: dict[str, float] = field(default_factory=dict)
    """Seconds of each part, for the `server-timing` header."""
    texts: Sequence[str] | None = None


class Service:
    """One model being served. Made before the event loop; `start` and `close` run inside it."""

    def __init__(self, settings: Settings, choice: Choice, searcher: "Searcher | None" = None) -> None:
        self.searcher = searcher
        self.settings, self.choice = settings, choice
        self.engine, self.card = choice.engine, choice.card
        nesting = self.card.nesting
        self.trained = () if nesting is None else nesting.widths
        strict = tuple(sorted({*self.trained, self.engine.width})) if settings.strict_widths else None
        self.allowed = Allowed(
            names=settings.served_as,
            width=self.engine.width,
            widths=strict,
            depths=self.card.depths or ((self.engine.layers,) if self.engine.layers else None),
            prompts=tuple(choice.prompts),
            max_inputs=settings.max_inputs,
            vocabulary=self.engine.vocabulary if settings.token_ids else None,
        )
        self.max_input_tokens = min(settings.max_input_tokens, self.engine.max_tokens or settings.max_input_tokens)
        self.keys: Keys | None = read_keys(Path(settings.api_keys)) if settings.api_keys else None
        self.plans = read_plans(Path(settings.plans)) if settings.plans else None
        self.metrics = Metrics((*self.trained, self.engine.width))
        self.began = time.time()
        self.draining = False
        self.in_flight = 0
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="matryo-tokens")
        self._characters, self._pace = 0, 0.0
        """Characters with the tokeniser's thread, and how many it does a second; 0 while nothing is known."""
        self._probe: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work on the running event loop."""
        settings = self.settings
        self.batcher = Batcher(
            self.engine,
            batch_tokens=settings.batch_tokens,
            queue_tokens=settings.queue_tokens,
            patience=settings.timeout,
            watch=self.metrics.watch(),
        )
        self.batcher.start()

    async def close(self) -> None:
        """Let the batch that runs finish and stop."""
        await self.batcher.close()
        self._tokeniser.shutdown(wait=False)
        if self.searcher is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.searcher.close)

    async def tokens(self, texts: Sequence[str], prompt: str | None) -> list[Tokens]:
        """Texts with their prompt put in front, as the model's tokens.

        Raises:
            ApiError: 429 where so much waits already that it would not be done in time.
        """
        words = self.choice.default_prompt if prompt is None else self.choice.prompts.get(prompt, "")
        whole = [words + text for text in texts] if words else texts
        try:
            self.batcher.refuse_overload(1)
        except OverloadedError as error:
            raise _overloaded(error.retry_after) from error
        size = sum(map(len, whole))
        ids = self.engine.tokens(whole) if size <= INLINE_CHARACTERS else await self._tokens_aside(whole, size)
        return [Tokens(found, text) for found, text in zip(ids, whole, strict=True)]

    async def _tokens_aside(self, texts: Sequence[str], size: int) -> list[list[int]]:
        """In the tokeniser's thread, whose queue is bounded in time as the model's is."""
        wait = self._characters / self._pace if self._pace else 0.0
        if wait > self.settings.timeout / 2:
            raise _overloaded(min(LONGEST_RETRY, max(1, round(wait / 2))))

        def run() -> list[list[int]]:
            began = time.monotonic()
            found = self.engine.tokens(texts)
            pace = size / max(time.monotonic() - began, 1e-6)
            self._pace = 0.8 * self._pace + 0.2 * pace if self._pace else pace
            return found

        self._characters += size
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokeniser, run)
        finally:
            self._characters -= size

    def fitted(self, inputs: list[Tokens], cut: bool, param: str) -> list[Tokens]:
        """Inputs that fit the model: too long ones cut where that was asked for, refused otherwise."""
        most = self.max_input_tokens
        for n, one in enumerate(inputs):
            if not one.ids:
                raise invalid(f"{param}[{n}]", f"'{param}[{n}]' has no token the model knows.", "empty_input")
            if len(one.ids) > most:
                if not cut:
                    raise invalid(
                        f"{param}[{n}]",
                        f"'{param}[{n}]' has {len(one.ids)} tokens; this model takes {most}. Shorten it, or send "
                        '"truncate": "end" to have it cut.',
                        "context_length_exceeded",
                    )
                inputs[n] = replace(one, ids=self.engine.cut(one.ids, most))
        total, limit = sum(len(one.ids) for one in inputs), self.settings.max_request_tokens
        if total > limit:
            raise invalid(param, f"The request has {total} tokens; at most {limit} are allowed.", "too_many_tokens")
        return inputs

    async def encode(self, call: Call, inputs: list[Tokens], width: int, param: str) -> Float32s:
        """(N, width) unit rows for a request's inputs.

        Raises:
            ApiError: 429 or 503 where the server cannot take it or finish it in time, 400 or 500 naming the input that
                the model gave nothing for. ClientGoneError: the caller left meanwhile.
        """
        call.inputs, call.width = len(inputs), width
        call.tokens = sum(len(one.ids) for one in inputs)
        try:
            job = self.batcher.submit(inputs)
        except OverloadedError as error:
            raise _overloaded(error.retry_after) from error
        try:
            await self._finished(call, job)
        except EncodingError as error:
            raise internal(call.number, f"{param}[{error.position}]") from error
        finally:
            self.batcher.leave(job)
        now = time.monotonic()
        call.timing["queue"] = (job.started or now) - job.entered
        call.timing["model"] = now - (job.started or now)
        self.metrics.inputs.inc(call.inputs)
        self.metrics.tokens.inc(call.tokens)
        return _prefixes(job.vectors, width, param)

    async def _finished(self, call: Call, job: Job) -> None:
        """Wait for a request's rows, its deadline, or the end of its connection, whichever is first."""
        await asyncio.sleep(0)  # a small batch of a quick model is done by then
        if job.done.done():
            job.done.result()
            return
        left = self.settings.timeout - (time.monotonic() - call.began)
        gone = asyncio.ensure_future(_gone(call))
        try:
            await asyncio.wait({job.done, gone}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if job.done.done():
            job.done.result()
        elif gone.done() and not gone.cancelled():
            raise ClientGoneError
        else:
            raise ApiError(503, "The request was not finished in time.", code="timeout", retry_after=1)

    async def ready(self) -> bool:
        """Whether an encode came out well in the last seconds; tries one of its own if none was asked for."""
        if self.draining:
            return False
        last = self.batcher.last_success
        if last is None or time.monotonic() - last > STALE:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.get_running_loop().create_task(self._try())
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._probe), PROBE_SECONDS)
        last = self.batcher.last_success
        return last is not None and time.monotonic() - last <= STALE

    async def _try(self) -> None:
        with suppress(ApiError, OverloadedError, EncodingError):
            job = self.batcher.submit(await self.tokens(["ready"], None))
            await job.done


def _overloaded(seconds: int) -> ApiError:
    message = "The server has more work than it can do in time."
    return ApiError(429, message, code="overloaded", retry_after=seconds)


def _prefixes(vectors_ND: Float32s, width: int, param: str) -> Float32s:
    """Unit prefixes. A row without direction at this width has no embedding, and is named instead of sent as zeros."""
    prefix = vectors_ND[:, :width]
    empty = ~prefix.any(axis=1)
    if empty.any():
        n = int(np.flatnonzero(empty)[0])
        raise invalid(
            f"{param}[{n}]", f"The model gives only zeros for '{param}[{n}]' at width {width}.", "no_embedding"
        )
    return truncate(prefix, width)


async def _gone(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass
