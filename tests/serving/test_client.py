"""`Client` and `AsyncClient` against a running server, and against servers that are busy, broken or something else."""

import asyncio
import base64
import json
import subprocess

import httpx2
import numpy as np
import pytest

import matryo as mt
from matryo.clients import Local, wire
from matryo.core.errors import (
    AccessError,
    InputError,
    MatryoError,
    MissingExtraError,
    RefusedError,
    RemoteError,
    UnavailableError,
)
from matryo.encoders.folder import fingerprint

TEXTS = ["a puzzle game for the terminal", "library for reading images", "a mail server"]
KEY = "mt-secret-and-long"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("MATRYO_URL", "MATRYO_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model(static_model):
    return mt.load(static_model)


@pytest.fixture(params=["sync", "async"])
def call(request):
    """`call(options, name, *arguments)`: one method of a fresh client of either kind."""

    def go(options, name, *arguments, **more):
        if request.param == "sync":
            with mt.Client(**options) as client:
                return getattr(client, name)(*arguments, **more)

        async def main():
            async with mt.AsyncClient(**options) as client:
                return await getattr(client, name)(*arguments, **more)

        return asyncio.run(main())

    return go


def vectors(count, width=4):
    row = base64.b64encode(np.eye(1, width, dtype="<f4").tobytes()).decode()
    return {"data": [{"index": n, "embedding": row} for n in range(count)]}


class Scripted(httpx2.MockTransport):
    """A server that gives prepared answers in turn and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        super().__init__(self.handle)

    def handle(self, request):
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.read())


@pytest.fixture
def waits(monkeypatch):
    """Seconds that clients would have waited."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr("matryo.clients.http.asyncio.sleep", sleep)
    return waited


def refused(status, headers=(), **error):
    return httpx2.Response(status, headers=dict(headers), json={"error": {"message": "Not now.", **error}})


@pytest.mark.parametrize("width", [None, 1, 10, 48])
def test_embed_gives_the_models_vectors(call, served, model, width):
    found = call({"url": served.url}, "embed", TEXTS, width=width)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, model.encode(TEXTS, width=width))


def test_codes_are_those_of_the_vectors(call, served, model):
    unit = model.encode(TEXTS, width=16)
    for dtype, expected in (
        ("int8", np.rint(unit / np.abs(unit).max(axis=1, keepdims=True) * 127)),
        ("ubinary", model.encode(TEXTS, width=16, code="binary")),
    ):
        found = call({"url": f"{served.url}/v1/"}, "embed", TEXTS, 16, dtype=dtype)
        np.testing.assert_array_equal(found, expected)
    moved = call({"url": served.url}, "embed", TEXTS, 16, dtype="uint8").astype(int) - 128
    np.testing.assert_array_equal(moved, call({"url": served.url}, "embed", TEXTS, 16, dtype="int8"))


def test_many_texts_go_in_several_requests_and_come_back_in_order(call, served, model, monkeypatch):
    monkeypatch.setattr(wire, "MOST_TEXTS", 7)
    texts = [f"{TEXTS[n % 3]} {n}" for n in range(30)]
    np.testing.assert_array_equal(call({"url": served.url}, "embed", texts, 8), model.encode(texts, width=8))
    assert call({"url": served.url}, "embed", [], 8).shape == (0, 8)
    monkeypatch.setattr(wire, "MOST_BYTES", 40)
    parts = list(wire.batches(["x" * 20, "y" * 20, "z", "w" * 99, "é" * 19]))
    assert [list(map(len, part)) for part in parts] == [[20, 20], [1], [99], [19]]


def test_search_is_the_indexs_own(call, guarded, model, documents):
    server, key = guarded
    options = {"k": 4, "where": {"section": "games"}, "explain": True}
    found = call({"url": server.url, "key": key}, "search", TEXTS, **options)
    with mt.Index.open(documents, read_only=True) as index:
        near = Local(model, index).search(TEXTS, **options)
        assert (found.ids, found.documents, found.metadata) == (near.ids, near.documents, near.metadata)
        np.testing.assert_allclose(found.scores, near.scores, atol=1e-6)
        assert found.plan == near.plan == "16:binary keep 40 > 48:float32"
        assert [stage["stage"] for stage in found.explanation] == [stage["stage"] for stage in near.explanation]
        one = call({"url": server.url, "key": key}, "search", TEXTS[0], 2, plan="48:float32")
        assert (len(one), one.plan, one.explanation) == (1, "48:float32", None)
        assert one.ids == Local(model, index).search(TEXTS[0], 2, plan="48:float32").ids


def test_models_and_names(call, served):
    (first, alias) = call({"url": served.url}, "models")
    assert (first["id"], first["embedding_size"], alias["id"]) == ("words", 48, "text-embedding-3-small")
    named = call({"url": served.url, "model": "text-embedding-3-small"}, "embed", TEXTS)
    np.testing.assert_array_equal(named, call({"url": served.url}, "embed", TEXTS))
    with pytest.raises(RefusedError, match="404: No such model here; this server has 'words'") as caught:
        call({"url": served.url, "model": "other"}, "embed", TEXTS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert isinstance(caught.value, ValueError)


def test_what_the_server_refuses_names_the_field(call, served):
    with pytest.raises(RefusedError, match=r"'dimensions' must be an integer in 1\.\.48, got 49") as caught:
        call({"url": served.url}, "embed", TEXTS, 49)
    assert caught.value.param == "dimensions"
    assert caught.value.request
    with pytest.raises(RefusedError, match="started without --index"):
        call({"url": served.url}, "search", "chess")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("embed", {"texts": "one"}, "got one text; put it in a list"),
        ("embed", {"texts": ["a", " "]}, r"texts\[1\] is empty"),
        ("embed", {"texts": ["a", "\ud800"]}, r"texts\[1\] holds a lone surrogate"),
        ("embed", {"texts": ["a"], "width": True}, "width must be an integer"),
        ("embed", {"texts": ["a"], "dtype": "float32"}, "dtype must be one of float, int8"),
        ("search", {"query": ["a"], "k": 0}, "k must be a whole number of at least 1, got 0"),
        ("search", {"query": ["a"], "where": {"year": float("nan")}}, "cannot be written as JSON"),
    ],
)
def test_what_is_wrong_here_is_not_sent(call, name, arguments, said):
    transport = Scripted()
    with pytest.raises(InputError, match=said):
        call({"transport": transport, "model": "m"}, name, **arguments)
    assert transport.asked == []


def test_busy_servers_are_asked_again_when_they_say(call, waits):
    transport = Scripted(
        refused(429, {"retry-after": "7"}),
        httpx2.ConnectError("refused"),
        refused(503, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        refused(429),
        httpx2.Response(200, json=vectors(1)),
    )
    assert call({"transport": transport, "model": "m"}, "embed", ["a"]).shape == (1, 4)
    assert len(transport.asked) == 5
    assert waits[0] == 7
    assert 0.25 <= waits[1] <= 0.5
    assert waits[2] == 0
    assert 1 <= waits[3] <= 2


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [
        ([refused(429)] * 3, UnavailableError, "429: Not now"),
        ([refused(503, {"retry-after": "3600"})], UnavailableError, "503: Not now"),
        ([refused(429, {"x-should-retry": "false"})], UnavailableError, "429: Not now"),
        ([httpx2.ReadTimeout("too slow")], UnavailableError, "gave no answer .too slow"),
        ([httpx2.ConnectError("refused")] * 3, UnavailableError, "gave no answer .refused"),
        ([httpx2.RemoteProtocolError("closed")] * 3, UnavailableError, "gave no answer .closed"),
        ([refused(500, {"x-request-id": "n7"})], RemoteError, "500: Not now. .request n7"),
        ([httpx2.Response(502, text="<html>")], RemoteError, "502: no reason given"),
        ([httpx2.Response(400, json={"error": "plain words"})], RefusedError, "400: plain words"),
        ([httpx2.Response(307, headers={"location": "http://x"})], RemoteError, "307"),
        ([httpx2.Response(200, text="<html>")], RemoteError, "its answer is not JSON"),
        ([httpx2.Response(200, json=[1])], RemoteError, "its answer is no object"),
        ([httpx2.Response(200, json={})], RemoteError, "its vectors cannot be read"),
        ([httpx2.Response(200, json=vectors(1))], RemoteError, "it gave 1 vectors for 2 texts"),
        ([httpx2.Response(200, json=vectors(2, 8))], RemoteError, "width 8 where 4 was asked for"),
    ],
)
def test_answers_that_are_none(call, waits, answers, error, said):
    transport = Scripted(*answers)
    with pytest.raises(error, match=said) as caught:
        call({"transport": transport, "model": "m", "retries": 2}, "embed", ["a", "b"], 4)
    assert type(caught.value) is error
    assert len(transport.asked) == len(answers)
    assert len(waits) == len(answers) - 1


def test_rows_are_put_in_order_and_lists_are_taken_too(call):
    data = [{"index": 1, "embedding": [0, 1]}, {"index": 0, "embedding": [1, 0]}]
    transport = Scripted(httpx2.Response(200, json={"data": data}))
    assert call({"transport": transport, "model": "m"}, "embed", ["a", "b"]).tolist() == [[1, 0], [0, 1]]
    asked = json.loads(transport.asked[0].content)
    assert asked == {"model": "m", "input": ["a", "b"], "encoding_format": "base64"}


def test_address_and_key_may_come_from_the_environment(call, guarded, monkeypatch):
    server, key = guarded
    with pytest.raises(AccessError, match=r"401: A valid key is needed.*MATRYO_API_KEY"):
        call({"url": server.url, "model": "words"}, "embed", ["a"])
    monkeypatch.setenv("MATRYO_URL", server.url)
    monkeypatch.setenv("MATRYO_API_KEY", key)
    assert call({}, "embed", TEXTS).shape == (3, 48)


def test_the_key_is_shown_nowhere(call, waits):
    echo = httpx2.Response(401, json={"error": {"message": f"Bad key {KEY}"}})
    for answer in (echo, httpx2.ReadTimeout("slow"), httpx2.Response(500, text=KEY)):
        with pytest.raises(MatryoError) as caught:
            call({"transport": Scripted(answer), "key": KEY, "model": "m", "retries": 0}, "embed", ["a"])
        error = caught.value
        while error is not None:
            assert KEY not in f"{error} {error!r} {vars(error)}"
            error = error.__cause__ or error.__context__
    client = mt.Client("http://localhost:1", KEY)
    assert repr(client) == "Client('http://localhost:1', model=None)"
    assert KEY not in repr(vars(client))
    with pytest.raises(InputError, match="printable ASCII") as caught:
        mt.Client(key=KEY + "\n")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:99999", "http://[::1"])
def test_addresses_that_are_none(url):
    with pytest.raises(InputError, match="must be like http://127"):
        mt.Client(url)


def test_options_that_are_wrong():
    for options, said in (
        ({"url": "http://me:word@a"}, "no password, query or fragment"),
        ({"timeout": 0}, "timeout must be seconds above 0"),
        ({"retries": -1}, "retries must be a whole number"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            mt.Client(**options)
        assert "word@" not in str(caught.value)


def test_local_is_a_clients_twin(model, documents):
    near = Local(model)
    np.testing.assert_array_equal(near.embed(TEXTS, 16, input_type="query"), model.encode(TEXTS, width=16))
    with pytest.raises(InputError, match=r"there is no index to search; give one: Local\(model, index\)"):
        near.search("chess")
    with pytest.raises(InputError, match="input_type must be query or document, got 'poem'"):
        near.embed(TEXTS, input_type="poem")
    with mt.Index.open(documents, read_only=True) as index, pytest.raises(InputError, match="the model gives 64"):
        Local(mt.load("toy"), index)

    class Prompted:
        name, width = "asks", 8
        encoder = type("Encoder", (), {"about": type("About", (), {"prompts": {"query": "find: ", "document": ""}})})

    with pytest.raises(InputError, match=r"asks has prompts \(query\), which only a server applies"):
        Local(Prompted())


def test_clients_need_httpx2_and_nothing_heavy(monkeypatch, python):
    look = "import sys; from matryo import Client; Client(); print({'torch', 'faiss', 'starlette'} & set(sys.modules))"
    ran: subprocess.CompletedProcess[str] = python("-W", "error", "-c", look)
    assert ran.stdout.strip() == "set()", ran.stderr
    monkeypatch.setitem(__import__("sys").modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"matryo.Client needs httpx2.*pip install 'matryo\[client\]'"):
        mt.Client()


@pytest.fixture
def writable(serve, static_model, tmp_path):
    folder = tmp_path / "docs.matryo"
    made_by = {"name": str(static_model)} | fingerprint(str(static_model))
    mt.Index.create(folder, width=48, plan="48:float32", model=made_by).close()
    return serve(static_model, "--index", folder, "--writable")


def test_items_are_written_in_batches_and_deleted(call, writable, monkeypatch):
    monkeypatch.setattr(wire, "MOST_TEXTS", 2)
    options, ids = {"url": writable.url}, ["a", "b", "c", "d", "e"]
    texts = ["a mail server", "mail for images", "puzzle game", "library", "terminal"]
    assert call(options, "upsert", ids, texts, [{"n": n} for n in range(5)]) == 5
    assert call(options, "upsert", ["e"], ["terminal"]) == 1
    found = call(options, "search", "puzzle game", 1)
    assert (found.ids, found.documents, found.metadata) == ([["c"]], [["puzzle game"]], [[{"n": 2}]])
    assert call(options, "search", "terminal", 1).metadata == [[None]]
    assert call(options, "delete", ["c", "nobody", "a"]) == 2
    assert set(call(options, "search", "puzzle game", 9).ids[0]) == {"b", "d", "e"}
    assert call(options, "upsert", [], []) == call(options, "delete", []) == 0


def test_items_that_do_not_fit_together_are_not_sent(call, guarded):
    server, key = guarded
    options = {"url": server.url, "key": key}
    with pytest.raises(InputError, match="got 2 ids, 1 texts and 2 metadata; give one of each"):
        call(options, "upsert", ["a", "b"], ["one"])
    with pytest.raises(InputError, match="ids must be a list of texts, got one text"):
        call(options, "delete", "abc")
    # A server that was not started for it has no such path.
    with pytest.raises(RefusedError, match="404"):
        call(options, "upsert", ["a"], ["one"])


def test_an_answer_that_counts_nothing_is_told(call):
    transport = Scripted(httpx2.Response(200, json={"object": "items"}))
    with pytest.raises(RemoteError, match="it does not say how many items were written"):
        call({"transport": transport}, "upsert", ["a"], ["one"])
