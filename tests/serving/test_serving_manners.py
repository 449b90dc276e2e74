"""What a server owes its callers when things go wrong: shapes, deadlines, shutting down, keys, logs, metrics."""

import asyncio
import io
import json
import logging
import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryo.core.errors import DamagedError, FormatError, InputError
from matryo.core.prefix import Nesting
from matryo.encoders import Card
from matryo.serving import Settings
from matryo.serving.app import create_app
from matryo.serving.engines import Choice
from matryo.serving.keys import add_key, read_keys
from matryo.serving.logs import log_to
from matryo.serving.service import Service

SHAPE = {"message", "type", "param", "code"}


class Fragile:
    """Word counts in 8 dimensions; some words make it fail in some way. Waits for `gate` where a text says 'slow'."""

    name, width, max_tokens, vocabulary, pads, inline_tokens, layers = "fragile", 8, 50, None, True, 0, None

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.encoded: list[str] = []

    def tokens(self, texts):
        return [[hash(word) % 1000 for word in text.split()] for text in texts]

    def cut(self, ids, length):
        return ids[:length]

    def vectors(self, batch):
        if any("slow" in one.text for one in batch):
            assert self.gate.wait(10)
        if any("crash" in one.text for one in batch):
            raise RuntimeError("secret of the model")
        self.encoded += [one.text for one in batch]
        rows = np.array([[len(one.ids), *map(ord, one.text[:7].ljust(7))] for one in batch], np.float32)
        rows[["nan" in one.text for one in batch]] = np.nan
        rows[["inf" in one.text for one in batch], 3] = np.inf
        rows[["zero" in one.text for one in batch]] = 0
        return rows


@pytest.fixture
def fragile():
    """`fragile(**settings)`: an application over a fragile model."""

    def go(**more):
        asked = Settings(**{"model": "fragile", "access_log": False, **more})
        return create_app(Service(asked, Choice(Fragile(), Card("fragile", Nesting([4, 8])), {}, "", "a test", None)))

    return go


def engine_of(app):
    return service_of(app).engine


def service_of(app):
    return app.routes[0].app.service


def ask(here, *texts, **more):
    return here.post({"model": "fragile", "input": list(texts)}, **more)


def test_one_bad_text_hurts_nobody_else(within, fragile):
    async def body(here):
        texts = [f"good text {n}" for n in range(31)]
        texts.insert(11, "crash")
        answers = await asyncio.gather(*(ask(here, text) for text in texts))
        assert [n for n, one in enumerate(answers) if one.status_code != 200] == [11]
        error = answers[11].json()["error"]
        assert answers[11].status_code == 500
        assert "secret" not in error["message"]
        assert answers[11].headers["x-request-id"] in error["message"]
        assert answers[11].headers["x-should-retry"] == "false"
        assert (await ask(here, "and on it goes")).status_code == 200

    within(fragile(), body)


@pytest.mark.parametrize(("text", "status"), [("nan", 500), ("inf", 500), ("zero", 400)])
def test_a_text_without_a_vector_is_named_and_never_answered(within, fragile, text, status):
    async def body(here):
        answer = await ask(here, "good", text, "good")
        assert answer.status_code == status
        assert answer.json()["error"]["param"] == "input[1]"

    within(fragile(), body)


def test_a_deadline_ends_the_wait(within, fragile):
    app = fragile(timeout=0.1)

    async def body(here):
        answer = await ask(here, "slow")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "timeout"
        assert answer.headers["retry-after"] == "1"
        assert "x-should-retry" not in answer.headers
        engine_of(app).gate.set()

    within(app, body)


def test_overload_is_a_429_with_a_time(within, fragile):
    app = fragile(queue_tokens=3)

    async def body(here):
        slow = [asyncio.ensure_future(ask(here, "slow"))]
        await asyncio.sleep(0.05)
        slow.append(asyncio.ensure_future(ask(here, "one two three")))
        await asyncio.sleep(0.05)
        answer = await ask(here, "four")
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1
        engine_of(app).gate.set()
        assert [one.status_code for one in await asyncio.gather(*slow)] == [200, 200]

    within(app, body)


def test_a_caller_who_leaves_takes_the_work_along(within, fragile):
    app = fragile()

    async def leave(text):
        """One request by hand whose connection ends while it waits."""
        sent, ended = [], asyncio.Event()
        content = json.dumps({"model": "fragile", "input": text}).encode()
        messages = [{"type": "http.request", "body": content}]

        async def receive():
            if messages:
                return messages.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost:8000")]
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers, "query_string": b""}
        task = asyncio.ensure_future(app(scope, receive, send))
        await asyncio.sleep(0.05)
        ended.set()
        await task
        assert sent == []

    async def body(here):
        slow = asyncio.ensure_future(ask(here, "slow"))
        await asyncio.sleep(0.05)
        await leave("gone away")
        engine_of(app).gate.set()
        assert (await slow).status_code == 200
        assert (await ask(here, "later")).status_code == 200
        assert engine_of(app).encoded == ["slow", "later"]

    within(app, body)


def test_draining_refuses_new_work_and_finishes_what_was_accepted(within, fragile):
    app = fragile()

    async def body(here):
        slow = asyncio.ensure_future(ask(here, "slow"))
        await asyncio.sleep(0.05)
        service_of(app).draining = True
        answer = await ask(here, "new")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["connection"] == "close"
        assert (await here.http.get("/ready")).status_code == 503
        assert (await here.http.get("/health")).status_code == 200
        engine_of(app).gate.set()
        assert (await slow).status_code == 200

    within(app, body)


def test_ready_means_that_an_encode_came_out_well(within, fragile):
    app = fragile()
    engine = engine_of(app)
    whole = engine.vectors

    def broken(batch):
        raise RuntimeError("no model")

    async def body(here):
        engine.vectors = broken
        assert (await here.http.get("/ready")).status_code == 503
        assert (await here.http.get("/health")).status_code == 200
        engine.vectors = whole
        assert (await here.http.get("/ready")).status_code == 200

    within(app, body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("text"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("model", "input", "dimensions", "encoding_format", "user", "depth", "output_dtype", "input_type", "truncate")
BODIES = st.binary(max_size=60) | st.fixed_dictionaries(
    {"model": st.just("fragile") | VALUES, "input": VALUES}, optional=dict.fromkeys(NAMES[2:], VALUES)
).map(lambda body: json.dumps(body).encode("utf-8", "surrogatepass"))


def test_no_malformed_request_is_ever_a_500(in_process, fragile):
    @settings(max_examples=400, deadline=None, database=None)
    @given(body=BODIES)
    def check(body):
        found.append(loop.run_until_complete(send(body)))

    async def send(body):
        answer = await here[0].post(body)
        if answer.status_code != 200:
            assert 400 <= answer.status_code < 500, body
            assert set(answer.json()["error"]) == SHAPE
        return answer.status_code

    app = fragile()
    found, here = [], []
    loop = asyncio.new_event_loop()
    lifespan = app.router.lifespan_context(app)
    try:
        loop.run_until_complete(lifespan.__aenter__())
        here.append(in_process(app))
        check()
        loop.run_until_complete(here[0].http.aclose())
    finally:
        loop.run_until_complete(lifespan.__aexit__(None, None, None))
        loop.close()
    assert 400 in found


def test_keys_scopes_and_what_is_open(within, fragile, tmp_path):
    path = tmp_path / "keys.json"
    good, writer = add_key(path, "web", ("search",)), add_key(path, "loader", ("write",))
    assert good not in path.read_text()

    async def body(here):
        for header in (
            {},
            {"authorization": "Bearer nope"},
            {"authorization": good},
            {"authorization": f"Basic {good}"},
        ):
            answer = await ask(here, "text", headers=header)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        answer = await ask(here, "text", headers={"authorization": f"Bearer {writer}"})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "insufficient_scope"
        assert (await ask(here, "text", headers={"authorization": f"Bearer {good}"})).status_code == 200
        assert (await here.openai(api_key=good).models.list()).data[0].id == "fragile"
        assert (await here.http.get("/v1/models")).status_code == 401
        assert (await here.http.get("/metrics")).status_code == 401
        assert (await here.http.get("/health")).status_code == 200

    within(fragile(api_keys=str(path)), body)


def test_files_of_keys_that_cannot_be_used(tmp_path):
    path = tmp_path / "keys.json"
    with pytest.raises(InputError, match="make one with: matryo key"):
        read_keys(path)
    with pytest.raises(InputError, match="1 to 64 letters"):
        add_key(path, "a b", ("search",))
    with pytest.raises(InputError, match="scopes are some of search, write"):
        add_key(path, "web", ("admin",))
    assert not path.exists()
    add_key(path, "web", ("search", "write"))
    with pytest.raises(InputError, match="has a key named 'web' already"):
        add_key(path, "web", ("search",))
    path.write_text('{"format": 1, "keys": []}')
    with pytest.raises(InputError, match="holds no keys"):
        read_keys(path)
    path.write_text('{"format": 2, "keys": []}')
    with pytest.raises(FormatError, match="reads format 1"):
        read_keys(path)
    for text in ("", "{}", "[1]", '{"format": 1, "keys": [{"name": "web", "scopes": ["search"], "sha256": "ab"}]}'):
        path.write_text(text)
        with pytest.raises(DamagedError, match="keys"):
            read_keys(path)


def test_settings_that_are_refused(tmp_path):
    for wrong, said in (
        ({"backend": "tpu"}, "backend must be one of auto, static"),
        ({"port": 70000}, r"port must be in 0\.\.65535"),
        ({"workers": 0}, "workers must be above 0, got 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"drain": -1.0}, "drain must be at least 0"),
        ({"cors": ("*",)}, "lets any web page use this server"),
        ({"host": "0.0.0.0"}, "can be reached by other machines"),
        ({"host": "example.org"}, "can be reached by other machines"),
    ):
        with pytest.raises(InputError, match=said):
            Settings(model="toy", **wrong)
    for host in ("localhost", "::1", "127.0.0.2"):
        Settings(model="toy", host=host)
    open_to_all = Settings(model="toy", host="0.0.0.0", insecure=True, aliases=("a", "b"))
    assert Settings.from_json(open_to_all.to_json()) == open_to_all


def test_browsers_of_other_origins_get_nothing_by_default(within, fragile):
    ask_first = {"origin": "https://page.example", "access-control-request-method": "POST"}

    async def closed(here):
        answer = await here.http.options("/v1/embeddings", headers=ask_first)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]

    async def opened(here):
        answer = await here.http.options("/v1/embeddings", headers=ask_first)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"

    within(fragile(), closed)
    within(fragile(cors=("https://page.example",)), opened)


def test_without_keys_only_names_of_this_machine_are_answered_to(within, fragile, tmp_path):
    """A page whose name was pointed at 127.0.0.1 is of the same origin to a browser."""
    names = {"localhost": 200, "localhost:8000": 200, "127.0.0.1:80": 200, "[::1]:8000": 200, "evil.example:8000": 403}

    async def guarded(here):
        for name, status in names.items():
            answer = await ask(here, "text", headers={"host": name})
            assert answer.status_code == status, name
        assert answer.json()["error"]["code"] == "host_not_allowed"

    async def open_to_all(here):
        assert (await ask(here, "text", headers={"host": "evil.example"})).status_code == 200

    within(fragile(), guarded)
    within(fragile(insecure=True), open_to_all)


@pytest.fixture
def logged():
    """What this package logs, as JSON lines, while the test runs."""
    loggers = [logging.getLogger(name) for name in ("matryo", "uvicorn")]
    before = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    stream = io.StringIO()
    log_to(stream)
    yield stream
    for one, handlers, level, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def test_logs_are_json_and_hold_no_text_and_no_key(within, fragile, logged, tmp_path):
    made = add_key(tmp_path / "keys.json", "web", ("search",))

    async def body(here):
        headers = {"authorization": f"Bearer {made}", "x-request-id": "n1"}
        assert (await ask(here, "private words", headers=headers)).status_code == 200
        assert (await ask(here, "private crash", headers=headers)).status_code == 500
        assert (await here.post({"model": "private", "input": "private"}, headers=headers)).status_code == 404

    within(fragile(access_log=True, api_keys=str(tmp_path / "keys.json")), body)
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    answered = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in answered] == [200, 500, 404]
    assert answered[0] | {"time": 0, "ms": 0} == {
        "time": 0,
        "ms": 0,
        "level": "info",
        "logger": "matryo.serving.access",
        "event": "request",
        "request": "n1",
        "endpoint": "embeddings",
        "status": 200,
        "key": "web",
        "inputs": 1,
        "tokens": 2,
        "width": 8,
    }
    assert "private" not in logged.getvalue()
    assert made not in logged.getvalue()


def test_texts_are_logged_where_the_operator_asks(within, fragile, logged):
    async def body(here):
        await ask(here, "some words")

    within(fragile(access_log=True, log_texts=True), body)
    assert json.loads(logged.getvalue().splitlines()[-1])["texts"] == ["some words"]


def test_metrics_count_what_happened(within, fragile):
    async def body(here):
        await ask(here, "one two", "three")
        await here.post({"model": "fragile", "input": "one two", "dimensions": 4})
        await here.post({"model": "fragile", "input": "one two", "dimensions": 3})
        await here.post(b"{")
        text = (await here.http.get("/metrics")).text
        for line in (
            'matryo_requests_total{endpoint="embeddings",status="200"} 3.0',
            'matryo_requests_total{endpoint="embeddings",status="400"} 1.0',
            'matryo_request_seconds_count{depth="full",endpoint="embeddings",width="8"} 1.0',
            'matryo_request_seconds_count{depth="full",endpoint="embeddings",width="4"} 1.0',
            'matryo_request_seconds_count{depth="full",endpoint="embeddings",width="other"} 1.0',
            "matryo_inputs_total 4.0",
            "matryo_tokens_total 7.0",
            "matryo_queue_tokens 0.0",
            "matryo_requests_in_flight 1.0",
        ):
            assert line in text, text

    within(fragile(), body)


def test_traces_are_spans_without_texts(within, fragile, monkeypatch):
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from matryo.serving import app, tracing

    kept = InMemorySpanExporter()
    monkeypatch.setattr(app, "tracing", lambda: tracing.tracing(SimpleSpanProcessor(kept)))

    async def body(here):
        await ask(here, "private words")

    within(fragile(traces=True), body)
    (span,) = kept.get_finished_spans()
    assert span.attributes["http.status_code"] == 200
    assert span.resource.attributes["service.name"] == "matryo"
    assert "private" not in span.to_json()


def test_a_signal_lets_accepted_requests_finish(serve, static_model):
    one = serve(static_model)
    text = "game " * 140
    answers = []

    def call():
        with one.openai() as client:
            answers.append(len(client.embeddings.create(model="words", input=[f"{text}{n}" for n in range(2000)]).data))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    with one.openai() as client:
        while "matryo_requests_in_flight 3.0" not in client._client.get(f"{one.url}/metrics").text:
            assert time.monotonic() < deadline
    assert one.stop() == 0
    for thread in threads:
        thread.join()
    assert answers == [2000, 2000]
    assert any(line["event"] == "draining" for line in one.lines)


def test_several_workers_share_the_port_and_their_counts(serve, static_model):
    one = serve(static_model, "--workers", 2)
    with one.openai(max_retries=5) as client:
        for _ in range(20):
            assert client.embeddings.create(model="words", input="mail").usage.total_tokens == 1
        text = client._client.get(f"{one.url}/metrics").text
    assert 'matryo_requests_total{endpoint="embeddings",status="200"} 20.0' in text
    one.stop()


def test_what_is_not_http_gets_the_same_shape(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(b"nonsense\r\n\r\n")
        head, _, body = wire.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert set(json.loads(body)["error"]) == SHAPE


def test_mistakes_are_said_before_the_port_opens(python, static_model, served):
    port = served.url.rsplit(":", 1)[1]
    for arguments, said in (
        ((static_model, "--host", "0.0.0.0"), "give --api-keys FILE"),
        ((static_model, "--backend", "torch"), "is a static model"),
        ((static_model, "--port", port), f"cannot listen on 127.0.0.1 port {port}: "),
        (("nowhere/at/all",), "no such model folder"),
    ):
        ran = python("-m", "matryo", "serve", *arguments)
        assert ran.returncode == 2
        assert said in ran.stderr.splitlines()[-1]
