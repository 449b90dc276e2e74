"""Faults of callers and processes, each in a short form and, marked slow, in the full one of docs/reliability.md.

What the full forms measure is printed (pytest -s) as a line of JSON; nothing here fails for being slow.
"""

import asyncio
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
import uvicorn
from faulty_callers import SHAPE, Wire, at_pace, embed, http, in_turns, malformed

import matryo as mt
from matryo.serving import Settings, create_app, server


def full(*values):
    """A parameter of the full form."""
    return pytest.param(*values, marks=pytest.mark.slow)


def told(**figures) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")


def p99(answers) -> float:
    """Milliseconds."""
    return 1000 * float(np.quantile([one.seconds for one in answers], 0.99))


@pytest.mark.parametrize("count", [400, full(10_000)])
def test_malformed_requests_are_all_refused_in_the_contracts_shape(served, count):
    draw = random.Random(0)
    requests = [malformed(draw) for _ in range(count)]
    answers = asyncio.run(in_turns(served.url, requests, 8))
    for request, one in zip(requests, answers, strict=True):
        assert 400 <= one.status < 500, request[:600]
        assert set(json.loads(one.body)["error"]) == SHAPE, request[:600]
    assert {one.status for one in answers} >= {400, 403, 404, 405, 413, 415}
    told(malformed=count, p99_ms=p99(answers), most_ms=1000 * max(one.seconds for one in answers))
    assert asyncio.run(in_turns(served.url, [embed("mail")], 1))[0].status == 200


STALLS = (b"", http(b"")[:40], http(b"{", length=99))
"""Nothing at all, half a head, half a body."""


def test_stalled_connections_are_cut(static_model, monkeypatch):
    """The deadlines of a real server, shortened."""
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
    asked = Settings(model=str(static_model), port=0, body_timeout=0.3, access_log=False)
    running = uvicorn.Server(server._config(asked, create_app(asked)))
    opened = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        stalled = [socket.create_connection(opened.getsockname()) for _ in range(12)]
        for n, wire in enumerate(stalled):
            wire.sendall(STALLS[n % 3])
        url = f"http://127.0.0.1:{opened.getsockname()[1]}"
        assert {one.status for one in asyncio.run(in_turns(url, [embed("mail")] * 50, 4))} == {200}
        for n, wire in enumerate(stalled):
            wire.settimeout(10)
            said = wire.makefile("rb").read()
            assert said.startswith(b"HTTP/1.1 408 ") if n % 3 == 2 else said == b""
            wire.close()
    finally:
        running.should_exit = True
        thread.join()


@pytest.mark.slow
def test_200_stalled_connections_are_cut_and_hurt_nobody(serve, static_model):
    one = serve(static_model, "--no-access-log")
    host, port = one.url.removeprefix("http://").split(":")
    requests = [embed(f"mail {n}") for n in range(3000)]
    asyncio.run(in_turns(one.url, requests, 8))  # warm
    rounds = [p99(asyncio.run(in_turns(one.url, requests, 8))) for _ in range(3)]
    began = time.monotonic()
    stalled = [socket.create_connection((host, int(port))) for _ in range(200)]
    for n, wire in enumerate(stalled):
        wire.sendall(STALLS[n % 3])
    beside = [p99(asyncio.run(in_turns(one.url, requests, 8))) for _ in range(3)]
    for wire in stalled:
        wire.settimeout(max(0.1, began + 30 - time.monotonic()))
        while wire.recv(4096):
            pass
        wire.close()
    told(stalled=200, p99_ms=rounds, p99_beside_ms=beside, all_cut_s=time.monotonic() - began)


def overloaded(url: str, request, seconds: float) -> None:
    """Peak with two callers in turns, then ten times that at a set pace."""
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < seconds / 4:
        answers = asyncio.run(in_turns(url, [request(count + n) for n in range(8)], 2))
        assert {one.status for one in answers} == {200}
        count += 8
    peak = count / (time.perf_counter() - began)
    began = time.perf_counter()
    answers = asyncio.run(at_pace(url, lambda n: request(count + n), 10 * peak, seconds))
    taken = time.perf_counter() - began
    good = [one for one in answers if one.status == 200]
    refused = [one for one in answers if one.status == 429]
    assert len(good) + len(refused) == len(answers)
    assert good
    assert refused
    for one in refused:
        assert int(one.headers["retry-after"]) >= 1
        assert set(json.loads(one.body)["error"]) == SHAPE
    told(
        overload_s=seconds,
        peak_per_s=peak,
        goodput_per_s=len(good) / taken,
        share=len(good) / taken / peak,
        refused=len(refused),
        refused_p50_ms=1000 * float(np.median([one.seconds for one in refused])),
        refused_p99_ms=p99(refused),
    )
    assert asyncio.run(in_turns(url, [request(0)], 1))[0].status == 200


@pytest.mark.parametrize("seconds", [1.5, full(60.0)])
def test_overload_is_refused_and_what_is_taken_is_answered(serve, exported, seconds):
    """A transformer, texts of some 68 tokens; a request that would wait half the timeout is refused."""
    texts, timeout = (4, 3) if seconds < 60 else (16, 5)
    line = ("--name", "words", "--no-access-log", "--threads", 1, "--timeout", timeout)
    one = serve(exported, *line, OMP_NUM_THREADS="1")
    overloaded(one.url, lambda n: embed([f"mail game library {1000 + n} {m} " * 11 for m in range(texts)]), seconds)
    one.stop()


def test_text_that_waits_for_the_tokeniser_is_bounded_in_time_too(within, static_model):
    app = create_app(Settings(model=str(static_model), access_log=False, timeout=0.2))
    engine = app.routes[0].app.service.engine
    whole, gate = engine.tokens, threading.Event()
    engine.tokens = lambda texts: gate.wait(10) and whole(texts)

    async def body(here):
        large = {"model": "words", "input": ["mail " * 1000]}
        gate.set()
        assert (await here.post(large)).status_code == 200
        gate.clear()
        app.routes[0].app.service._pace = 10_000.0  # characters a second: one such text is half a second's work
        taken = asyncio.ensure_future(here.post(large))
        await asyncio.sleep(0.02)
        refused = await here.post(large)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        gate.set()
        assert (await taken).status_code in (200, 503)

    within(app, body)


async def until_stopped(url: str, request, clients: int):
    """Callers who ask one after the other until nobody listens any more; all that was answered."""
    found = []

    async def call() -> None:
        wire = Wire(url)
        while True:
            try:
                found.append(await wire.ask(request))
            except ConnectionError:
                return
            if found[-1].status != 200:
                wire.close()
                await asyncio.sleep(0.01)

    await asyncio.gather(*(call() for _ in range(clients)))
    return found


@pytest.mark.parametrize("times", [2, full(50)])
def test_a_signal_in_flight_loses_no_accepted_request(serve, static_model, times):
    """What the server says it answered is what callers got; nobody gets half an answer."""
    draw, cut, answered = random.Random(0), 0, 0
    for _ in range(times):
        one = serve(static_model)
        found = []
        request = embed(["game mail library " * 20] * 40)
        callers = threading.Thread(target=lambda: found.extend(asyncio.run(until_stopped(one.url, request, 8))))  # noqa: B023
        callers.start()
        time.sleep(draw.uniform(0.05, 0.3))
        assert one.stop() == 0
        callers.join()
        assert {each.status for each in found} <= {0, 200, 503}
        logged = [line["status"] for line in one.lines if line["event"] == "request"]
        for status in (200, 503):
            assert logged.count(status) == sum(each.status == status for each in found)
        assert all(json.loads(each.body)["error"]["code"] == "shutting_down" for each in found if each.status == 503)
        answered += logged.count(200)
        cut += sum(each.status == 0 for each in found)
    told(sigterm=times, answered=answered, closed_before_they_were_read=cut)


@pytest.mark.parametrize("times", [1, full(20)])
def test_killed_in_flight_it_starts_again_at_once(serve, static_model, times):
    draw, took = random.Random(0), []
    one = serve(static_model)
    port = one.url.rsplit(":", 1)[1]
    for _ in range(times):
        callers = threading.Thread(target=lambda: asyncio.run(until_stopped(one.url, embed("mail"), 8)))  # noqa: B023
        callers.start()
        time.sleep(draw.uniform(0.05, 0.3))
        assert one.stop(signal.SIGKILL) == -signal.SIGKILL
        callers.join()
        began = time.monotonic()
        one = serve(static_model, port=port)
        while httpx2.get(f"{one.url}/ready").status_code != 200:
            assert time.monotonic() - began < 60
        took.append(time.monotonic() - began)
    one.stop()
    told(sigkill=times, ready_s=max(took))


def children(process: int) -> list[int]:
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def test_a_killed_worker_is_replaced_while_the_other_answers(serve, static_model):
    one = serve(static_model, "--workers", 2)
    with one.openai(max_retries=5) as client:
        before: list[int] = []
        while len(before) < 2:
            client.embeddings.create(model="words", input="mail")
            before = [child for child in children(one.process.pid) if b"spawn" in _line(child)]
        # A lone caller may always reach the same worker: stop that one to hear the other.
        os.kill(before[0], signal.SIGKILL)
        until = time.monotonic() + 30
        while True:
            assert client.embeddings.create(model="words", input="mail").usage.total_tokens == 1
            now = [child for child in children(one.process.pid) if b"spawn" in _line(child)]
            if len(now) == 2 and before[0] not in now:
                break
            assert time.monotonic() < until
            time.sleep(0.05)
    assert before[1] in now
    one.stop()


def test_a_worker_killed_before_it_answers_is_replaced_at_once(serve, static_model):
    """Its parent waits for its first sign of life, which never comes."""
    one = serve(static_model, "--workers", 2)
    before: list[int] = []
    while len(before) < 2:
        before = [child for child in children(one.process.pid) if b"spawn" in _line(child)]
    time.sleep(0.8)  # the parent asks after half a second; a worker loads numpy first
    for child in before:
        os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    with one.openai(max_retries=8) as client:
        assert client.embeddings.create(model="words", input="mail").usage.total_tokens == 1
    assert time.monotonic() - began < 45  # the health check alone would take 60
    assert not {*before} & {*children(one.process.pid)}
    one.stop()


def test_workers_stop_when_their_parent_was_killed(serve, static_model):
    one = serve(static_model, "--workers", 2)
    with one.openai(max_retries=5) as client:
        client.embeddings.create(model="words", input="mail")
    one.stop(signal.SIGKILL)  # returns when the last worker has closed what they all write to
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", int(one.url.rsplit(":", 1)[1])))


def _line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("count", [10, full(313)])
def test_requests_with_cancellations_swap_nothing(within, static_model, count):
    """32 clients; every third request is given up at a random moment."""
    model = mt.load(static_model)
    words = list(model.encoder.tokenizer.get_vocab())
    draw = np.random.default_rng(0)
    answered = []

    async def client(here, number):
        for _ in range(count):
            texts = [" ".join(draw.choice(words, 3)) for _ in range(draw.integers(1, 4))]
            width = int(draw.integers(1, 49))
            asked = here.post({"model": "words", "input": texts, "dimensions": width})
            if draw.integers(3) == 0:
                task = asyncio.ensure_future(asked)
                await asyncio.sleep(float(draw.random()) * 0.002)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                continue
            rows = [one["embedding"] for one in (await asked).json()["data"]]
            np.testing.assert_allclose(rows, model.encode(texts, width=width), atol=1e-6)
            answered.append(number)

    async def body(here):
        await asyncio.gather(*(client(here, number) for number in range(32)))

    within(Settings(model=str(static_model), access_log=False), body)
    assert len(answered) > 32 * count * 0.55
    told(requests=32 * count, compared=len(answered))
