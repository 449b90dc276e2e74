"""The batcher: like lengths together, the same text once, a bad input alone in its failure, a bounded queue."""

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryo.serving.batching import FULL_ENOUGH, Batcher, EncodingError, OverloadedError, Watch
from matryo.serving.engines import Tokens

POISON, NOTHING, INFINITE = 666, 667, 668


class Fake:
    """Rows of (first token, number of tokens); raises on POISON, gives NaN on NOTHING; waits for its gate."""

    name, width, max_tokens, vocabulary, inline_tokens = "fake", 2, None, None, 0

    def __init__(self, pads=True, gate=None, inline_tokens=0) -> None:
        self.pads, self.gate, self.inline_tokens = pads, gate, inline_tokens
        self.batches: list[list[int]] = []
        self.seen: list[int] = []

    def tokens(self, texts):
        return [[int(word) for word in text.split()] for text in texts]

    def cut(self, ids, length):
        return ids[:length]

    def vectors(self, batch):
        if self.gate is not None:
            assert self.gate.wait(10)
        self.batches.append([len(one.ids) for one in batch])
        self.seen += [one.ids[0] for one in batch]
        if any(POISON in one.ids for one in batch):
            raise RuntimeError("poisoned")
        rows = np.array([[one.ids[0], len(one.ids)] for one in batch], np.float32)
        rows[[NOTHING in one.ids for one in batch]] = np.nan
        rows[[INFINITE in one.ids for one in batch]] = np.inf
        return rows


def inputs(*lists):
    return [Tokens(list(ids), None) for ids in lists]


def batched(engine, body, **options):
    """Run an async body with a batcher that works."""

    async def main():
        chosen = {"batch_tokens": 512, "queue_tokens": 10_000, "patience": 30.0} | options
        batcher = Batcher(engine, **chosen)
        batcher.start()
        try:
            async with asyncio.timeout(20):
                return await body(batcher)
        finally:
            if engine.gate is not None:
                engine.gate.set()
            await batcher.close()

    return asyncio.run(main())


async def rows(batcher, *lists):
    job = batcher.submit(inputs(*lists))
    await job.done
    return job.vectors


@pytest.mark.parametrize("inline", [0, 1000])
def test_rows_come_back_in_order(inline):
    async def body(batcher):
        got = await asyncio.gather(*(rows(batcher, [n], [n, n], [n + 1]) for n in range(20)))
        for n, found in enumerate(got):
            np.testing.assert_array_equal(found, [[n, 1], [n, 2], [n + 1, 1]])

    batched(Fake(inline_tokens=inline), body)


def test_what_waits_is_batched_by_length_and_the_budget_holds():
    gate = threading.Event()
    engine = Fake(gate=gate)
    lengths = np.random.default_rng(0).integers(8, 200, 300)
    ran = []

    async def body(batcher):
        first = asyncio.ensure_future(rows(batcher, [0] * 9))
        await asyncio.sleep(0.01)
        jobs = [batcher.submit(inputs([n] * length)) for n, length in enumerate(lengths.tolist(), start=1)]
        gate.set()
        await asyncio.gather(first, *(job.done for job in jobs))
        for n, (job, length) in enumerate(zip(jobs, lengths, strict=True), start=1):
            np.testing.assert_array_equal(job.vectors, [[n, length]])

    batched(engine, body, watch=Watch(lambda *seen: ran.append(seen)), queue_tokens=100_000)
    assert len(engine.batches) < 150
    for batch in engine.batches:
        padded = max(batch) * len(batch)
        assert padded <= 512 or len(batch) == 1
        assert sum(batch) >= FULL_ENOUGH * padded
    assert sum(tokens for _, tokens, _, _ in ran) / sum(padded for _, _, padded, _ in ran) >= FULL_ENOUGH


def test_the_oldest_goes_first_whatever_its_length():
    gate = threading.Event()
    engine = Fake(gate=gate)

    async def body(batcher):
        jobs = [batcher.submit(inputs([0]))]
        await asyncio.sleep(0.01)
        jobs.append(batcher.submit(inputs([1] * 300)))
        jobs += [batcher.submit(inputs([2 + n, 2])) for n in range(50)]
        gate.set()
        await asyncio.gather(*(job.done for job in jobs))

    batched(engine, body)
    assert [batch[0] for batch in engine.batches[:3]] == [1, 300, 2]
    assert len(engine.batches) == 6  # 50 short ones, 16 at a time


def test_the_same_input_in_flight_is_encoded_once():
    gate = threading.Event()
    engine = Fake(gate=gate)
    shared = []

    async def body(batcher):
        running = batcher.submit(inputs([7, 7]))
        await asyncio.sleep(0.01)
        jobs = [batcher.submit(inputs([7, 7], [8], [8])) for _ in range(5)]
        gate.set()
        await asyncio.gather(running.done, *(job.done for job in jobs))
        for job in jobs:
            np.testing.assert_array_equal(job.vectors, [[7, 2], [8, 1], [8, 1]])

    batched(engine, body, watch=Watch(shared=shared.append))
    assert engine.seen == [7, 8]
    assert sum(shared) == 14


@pytest.mark.parametrize("bad", [POISON, NOTHING, INFINITE])
def test_a_bad_input_fails_alone(bad):
    gate = threading.Event()
    engine = Fake(gate=gate)

    async def body(batcher):
        first = batcher.submit(inputs([0]))
        await asyncio.sleep(0.01)
        jobs = [batcher.submit(inputs([n, bad if n == 13 else 1])) for n in range(32)]
        gate.set()
        results = await asyncio.gather(first.done, *(job.done for job in jobs), return_exceptions=True)
        failed = [n for n, one in enumerate(results[1:]) if isinstance(one, EncodingError)]
        assert failed == [13]
        for n, job in enumerate(jobs):
            if n != 13:
                np.testing.assert_array_equal(job.vectors, [[n, 2]])
        after = await rows(batcher, [5])
        np.testing.assert_array_equal(after, [[5, 1]])
        with pytest.raises(EncodingError) as caught:
            await rows(batcher, [1], [2], [bad])
        assert caught.value.position == 2
        assert batcher.waiting_tokens == 0

    batched(engine, body)


def test_the_queue_is_bounded_in_tokens():
    gate = threading.Event()

    async def body(batcher):
        running = batcher.submit(inputs([0] * 50))
        await asyncio.sleep(0.01)
        large = batcher.submit(inputs([1] * 500))  # an empty queue takes any request
        with pytest.raises(OverloadedError) as caught:
            batcher.submit(inputs([2]))
        assert caught.value.retry_after >= 1
        again = batcher.submit(inputs([1] * 500))  # costs nothing: it is in flight
        batcher.leave(large)
        assert batcher.waiting_tokens == 500
        batcher.leave(again)
        assert batcher.waiting_tokens == 0
        taken = batcher.submit(inputs([2]))
        gate.set()
        await asyncio.gather(running.done, taken.done)

    engine = Fake(gate=gate)
    batched(engine, body, queue_tokens=100)
    assert engine.seen == [0, 2]


def test_the_queue_is_bounded_in_time():
    gate = threading.Event()

    async def body(batcher):
        batcher.rate = 10.0
        jobs = [batcher.submit(inputs([1] * 10))]
        await asyncio.sleep(0.01)
        jobs += [batcher.submit(inputs([2] * 8)), batcher.submit(inputs([3] * 8))]
        with pytest.raises(OverloadedError):
            batcher.submit(inputs([4]))
        gate.set()
        await asyncio.gather(*(job.done for job in jobs))

    batched(Fake(gate=gate), body, patience=4.0)


def test_a_fault_of_the_server_itself_ends_no_later_request():
    calls = []

    def broken_once(*seen):
        calls.append(seen)
        if len(calls) == 1:
            raise OSError("metrics' disk is full")

    async def body(batcher):
        with pytest.raises(EncodingError):
            await rows(batcher, [1], [2, 2])
        np.testing.assert_array_equal(await rows(batcher, [1]), [[1, 1]])

    batched(Fake(), body, watch=Watch(broken_once))


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), min_size=1, max_size=4),
        st.sampled_from(["wait", "wait", "leave", "leave later"]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, inline=st.sampled_from([0, 10_000]), pads=st.booleans())
def test_no_answer_is_ever_swapped_or_lost(requests, inline, pads):
    async def body(batcher):
        kept = []
        for n, (shape, fate) in enumerate(requests):
            job = batcher.submit(inputs(*([first] * length for first, length in shape)))
            if n % 5 == 4:
                await asyncio.sleep(0)
            if fate == "leave":
                batcher.leave(job)
            elif fate == "leave later":
                asyncio.get_running_loop().call_soon(batcher.leave, job)
            else:
                kept.append((job, shape))
        for job, shape in kept:
            await job.done
            np.testing.assert_array_equal(job.vectors, shape)
        await asyncio.sleep(0)
        assert batcher.waiting_tokens == 0

    batched(Fake(pads=pads, inline_tokens=inline), body)
