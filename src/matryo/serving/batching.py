"""The batcher: requests' inputs into batches of like length, with no timer, and one bad input alone in its failure.

All state belongs to the event loop, so there are no locks: only the model itself runs in another thread, one batch at a
time, and whatever came in meanwhile makes the next batch. A batch small enough for the engine runs on the loop itself,
which is quicker than waking a thread.
"""

import asyncio
import itertools
import logging
import time
from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.serving.engines import Engine, Tokens

Float32s = NDArray[np.float32]

FULL_ENOUGH = 0.9
"""Share of a padded batch that must be real tokens."""
LARGEST_BATCH = 16
"""Inputs in one run of a transformer. More gain nothing on a processor, take memory, and let others wait longer."""
UNPADDED_TOKENS = 16_384
"""Tokens in one run of a model that pads nothing."""
LONGEST_RETRY = 60

log = logging.getLogger("matryo.serving")


class OverloadedError(Exception):
    """The queue is full, or so long that the request would be given up before its turn."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"come back in {retry_after} s")
        self.retry_after = retry_after


class EncodingError(Exception):
    """The model could not encode one input of a request: it raised, or gave NaN or Inf."""

    def __init__(self, position: int, cause: str) -> None:
        super().__init__(cause)
        self.position = position


@dataclass(eq=False, slots=True)
class Job:
    """A request's inputs on their way: rows arrive in `vectors` as their batches finish."""

    vectors: Float32s
    done: asyncio.Future[None]
    missing: int
    items: list["_Item"] = field(default_factory=list)
    entered: float = 0.0
    started: float | None = None
    """When the first of its batches began."""


@dataclass(eq=False, slots=True)
class _Item:
    """One distinct input, waited for by every request that holds it."""

    tokens: Tokens
    key: bytes
    number: int
    waiting: bool = True
    places: list[tuple[Job, int]] = field(default_factory=list)

    @property
    def cost(self) -> int:
        return len(self.tokens.ids)

    @property
    def rank(self) -> tuple[int, int]:
        return len(self.tokens.ids), self.number


@dataclass
class Watch:
    """What the batcher tells whoever measures; does nothing by default."""

    batch: Callable[[int, int, int, float], None] = lambda inputs, tokens, padded, seconds: None
    shared: Callable[[int], None] = lambda inputs: None


class Batcher:
    """Encodes inputs for many requests at once.

    Args:
        engine: what runs the model.
        batch_tokens: most tokens of a batch, padding included.
        queue_tokens: most tokens that may wait; a request that finds the queue empty is always taken.
        patience: seconds after which a request is given up; one that would surely wait longer is refused at once.
    """

    def __init__(
        self, engine: Engine, *, batch_tokens: int, queue_tokens: int, patience: float, watch: Watch | None = None
    ) -> None:
        self._engine, self._watch = engine, watch or Watch()
        self._batch_tokens, self._queue_tokens, self._patience = batch_tokens, queue_tokens, patience
        self._flying: dict[bytes, _Item] = {}
        self._oldest: deque[_Item] = deque()  # in order of arrival; those that left meanwhile are skipped
        self._by_length: list[tuple[int, int]] = []
        self._by_number: dict[int, _Item] = {}
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="matryo-model")
        self._worker: asyncio.Task[None] | None = None
        self.waiting_tokens = 0
        self.running_tokens = 0
        self.rate: float | None = None
        """Tokens a second lately, once something was encoded."""
        self.last_success: float | None = None
        """When a batch last came out well, by `time.monotonic`."""

    def start(self) -> None:
        """Begin to work on the running event loop."""
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Stop. Requests still waiting are cancelled; a batch that runs is waited for."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for job in {job for item in self._flying.values() for job, _ in item.places}:
            job.done.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def submit(self, inputs: Sequence[Tokens]) -> Job:
        """Queue a request's inputs; await `job.done`, then read `job.vectors`. To give up, call `leave(job)`.

        Raises:
            OverloadedError: nothing of the request was queued.
        """
        keys = [array("l", [one.depth or 0, *one.ids]).tobytes() for one in inputs]
        fresh = {key: one for key, one in zip(keys, inputs, strict=True) if key not in self._flying}
        self.refuse_overload(sum(len(one.ids) for one in fresh.values()))
        vectors = np.empty((len(inputs), self._engine.width), np.float32)
        job = Job(vectors, asyncio.get_running_loop().create_future(), len(inputs), entered=time.monotonic())
        for key, one in fresh.items():
            self._enter(_Item(one, key, next(self._numbers)))
        for place, key in enumerate(keys):
            item = self._flying[key]
            item.places.append((job, place))
            job.items.append(item)
        self._watch.shared(len(inputs) - len(fresh))
        self._wake.set()
        return job

    def refuse_overload(self, cost: int) -> None:
        """Raise if so many tokens more are too many: the queue is bounded in tokens, and in time once it is known how
        fast tokens go. Ask with 1 before the work of tokenising, which overload would make worse.
        """
        behind = self.waiting_tokens + self.running_tokens
        if not cost or not self.waiting_tokens:
            return
        seconds = behind / self.rate if self.rate else 0.0
        if self.waiting_tokens + cost > self._queue_tokens or seconds > self._patience / 2:
            raise OverloadedError(min(LONGEST_RETRY, max(1, round(seconds / 2))))

    def leave(self, job: Job) -> None:
        """Take a request out; inputs that nobody else waits for leave the queue with it."""
        for item in job.items:
            item.places = [(other, place) for other, place in item.places if other is not job]
            if item.waiting and not item.places:
                self._remove(item)
                del self._flying[item.key]
        job.items = []

    def _enter(self, item: _Item) -> None:
        self._flying[item.key] = item
        self._oldest.append(item)
        insort(self._by_length, item.rank)
        self._by_number[item.number] = item
        self.waiting_tokens += item.cost

    def _remove(self, item: _Item) -> None:
        item.waiting = False
        del self._by_length[bisect_left(self._by_length, item.rank)]
        del self._by_number[item.number]
        self.waiting_tokens -= item.cost

    def _take(self) -> list[_Item]:
        """The oldest input and those most like it in length, as many as a batch holds."""
        while self._oldest and not self._oldest[0].waiting:
            self._oldest.popleft()
        if not self._oldest:
            return []
        taken = self._alike(self._oldest[0]) if self._engine.pads else self._in_order()
        for item in taken:
            self._remove(item)
        return taken

    def _in_order(self) -> list[_Item]:
        """Without padding lengths do not matter: first come, first served."""
        taken: list[_Item] = []
        tokens = 0
        for item in self._oldest:
            if item.waiting:
                tokens += item.cost
                if taken and tokens > UNPADDED_TOKENS:
                    break
                taken.append(item)
        return taken

    def _alike(self, first: _Item) -> list[_Item]:
        """Neighbours of `first` in order of length, nearest first, while the batch stays nearly free of padding."""
        ranks = self._by_length
        low = bisect_left(ranks, first.rank)
        high, tokens = low + 1, first.cost
        while high - low < LARGEST_BATCH:
            below = first.cost - ranks[low - 1][0] if low > 0 else None
            above = ranks[high][0] - first.cost if high < len(ranks) else None
            if below is None and above is None:
                break
            downward = above is None or (below is not None and below <= above)
            length = ranks[low - 1][0] if downward else ranks[high][0]
            padded = max(ranks[high - 1][0], length) * (high - low + 1)
            if padded > self._batch_tokens or tokens + length < FULL_ENOUGH * padded:
                break
            low, high, tokens = (low - 1, high, tokens + length) if downward else (low, high + 1, tokens + length)
        return [self._by_number[number] for _, number in ranks[low:high]]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._take()
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            now = time.monotonic()
            for job in {job for item in batch for job, _ in item.places}:
                job.started = job.started or now
            tokens = sum(item.cost for item in batch)
            inputs = [item.tokens for item in batch]
            self.running_tokens = tokens
            if tokens <= self._engine.inline_tokens:
                rows = self._encode(inputs)
            else:
                rows = await loop.run_in_executor(self._thread, self._encode, inputs)
            self.running_tokens = 0
            try:
                self._deliver(batch, rows, tokens, time.monotonic() - now)
            except Exception:  # whatever it is, nobody waits for ever and the next batch is run
                log.exception("a batch could not be delivered")
                self._give_up(batch)
            await asyncio.sleep(0)  # answers go out, and requests come in, between two batches

    def _encode(self, inputs: Sequence[Tokens]) -> list[Float32s | str]:
        """A row for each input, or what went wrong with it. An input is blamed only after failing alone."""
        try:
            rows = self._engine.vectors(inputs)
            if rows.shape != (len(inputs), self._engine.width):
                raise ValueError(f"the model gave shape {rows.shape} for {len(inputs)} inputs")
        except Exception as error:
            if len(inputs) == 1:
                log.exception("the model failed on one input")
                return [f"{type(error).__name__} in the model"]
            half = len(inputs) // 2
            return self._encode(inputs[:half]) + self._encode(inputs[half:])
        sound: Any = np.isfinite(rows).all(axis=1)
        if sound.all():
            return list(rows)
        if len(inputs) == 1:
            return ["NaN or Inf from the model"]
        return [row if ok else self._encode([one])[0] for row, ok, one in zip(rows, sound, inputs, strict=True)]

    def _deliver(self, batch: list[_Item], rows: list[Float32s | str], tokens: int, seconds: float) -> None:
        padded = max(item.cost for item in batch) * len(batch) if self._engine.pads else tokens
        self._watch.batch(len(batch), tokens, padded, seconds)
        pace = tokens / max(seconds, 1e-6)
        self.rate = pace if self.rate is None else 0.8 * self.rate + 0.2 * pace
        for item, row in zip(batch, rows, strict=True):
            del self._flying[item.key]
            places, item.places = item.places, []
            if isinstance(row, str):
                for job, place in places:
                    self._fail(job, EncodingError(place, row))
                continue
            self.last_success = time.monotonic()
            for job, place in places:
                job.vectors[place] = row
                job.missing -= 1
                if not job.missing and not job.done.done():
                    job.done.set_result(None)

    def _give_up(self, batch: list[_Item]) -> None:
        for item in batch:
            self._flying.pop(item.key, None)
            for job, place in list(item.places):
                self._fail(job, EncodingError(place, "not delivered"))

    def _fail(self, job: Job, error: EncodingError) -> None:
        if not job.done.done():
            job.done.set_exception(error)
        self.leave(job)
