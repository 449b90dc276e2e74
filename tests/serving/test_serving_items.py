"""Changing the index over HTTP: only where it is allowed, by keys that may, and never half."""

import json
import signal

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import matryo as mt
from matryo.core.errors import InputError, LockedError, StorageError
from matryo.encoders.folder import fingerprint
from matryo.serving import Settings, create_app
from matryo.serving.keys import add_key


@pytest.fixture
def empty(static_model, tmp_path):
    folder = tmp_path / "docs.matryo"
    made_by = {"name": str(static_model)} | fingerprint(str(static_model))
    mt.Index.create(folder, width=48, model=made_by).close()
    return folder


@pytest.fixture
def settings(static_model, empty):
    return Settings(model=str(static_model), index=str(empty), writable=True, access_log=False)


def put(here, items, **more):
    return here.post({"items": items}, path="/v1/items", **more)


def item(n, text=None, **metadata):
    return {"id": f"d{n}", "text": text or f"game number {n}", "metadata": metadata or None}


def test_what_is_written_is_found_and_what_is_deleted_is_not(within, settings, static_model, empty):
    async def body(here):
        answer = await put(here, [item(0, "mail reader", section="mail"), item(1, "puzzle game"), item(2, "a library")])
        assert answer.json()["written"] == 3
        assert answer.json()["usage"]["total_tokens"] == 6
        found = (await here.post({"query": "mail reader", "k": 3}, path="/v1/search")).json()
        assert found["data"][0]["hits"][0] == {"id": "d0", "document": "mail reader"} | {
            "metadata": {"section": "mail"},
            "score": pytest.approx(1, abs=1e-3),
        }
        assert (await put(here, [item(0, "a terminal")])).json()["written"] == 1
        gone = await here.post({"ids": ["d1", "nobody"]}, path="/v1/items/delete")
        assert gone.json() == {"object": "items", "deleted": 1}
        found = (await here.post({"query": "mail reader", "k": 3}, path="/v1/search")).json()
        assert {hit["id"] for hit in found["data"][0]["hits"]} == {"d0", "d2"}
        assert {hit["document"] for hit in found["data"][0]["hits"]} == {"a terminal", "a library"}

    within(settings, body)
    with mt.Index.open(empty, read_only=True) as index:
        hits = index.search(mt.load(static_model).encode(["a terminal"]), k=1)
        np.testing.assert_allclose(hits.scores, 1, atol=1e-3)


def test_keys_need_the_scope(within, static_model, empty, tmp_path):
    path = tmp_path / "keys.json"
    reads, writes = ({"authorization": f"Bearer {add_key(path, scope, (scope,))}"} for scope in ("search", "write"))

    async def body(here):
        answer = await put(here, [item(0)], headers=reads)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "insufficient_scope"
        assert (await put(here, [item(0)])).status_code == 401
        assert (await put(here, [item(0)], headers=writes)).status_code == 200
        assert (await here.post({"query": "game"}, path="/v1/search", headers=writes)).status_code == 403

    within(Settings(model=str(static_model), index=str(empty), writable=True, api_keys=str(path)), body)


WRONG = [
    ({}, "items", "is required"),
    ({"items": []}, "items", "not empty"),
    ({"items": "text"}, "items", "a list"),
    ({"items": [item(0)] * 2049}, "items", "at most 2048"),
    ({"items": [item(0)], "more": 1}, "more", "Unknown field"),
    ({"items": ["text"]}, "items[0]", "must be an object, got a text"),
    ({"items": [item(0), {"id": "a"}]}, "items[1]", "must have 'id' and 'text'"),
    ({"items": [item(0) | {"vector": []}]}, "items[0]", "may have 'metadata'"),
    ({"items": [item(0), {"id": "a", "text": " "}]}, "items[1]", "is empty"),
    ({"items": [{"id": "a", "text": 5}]}, "items[0]", "must be a text, got an integer"),
    ({"items": [{"id": 5, "text": "a"}]}, "items", "ids must be distinct texts"),
    ({"items": [{"id": "", "text": "a"}]}, "items", "ids must be distinct texts"),
    ({"items": [{"id": "secret", "text": "a"}] * 2}, "items", "ids must be distinct texts"),
    ({"items": [item(0), {"id": "a", "text": "a", "metadata": [1]}]}, "items[1]", "must be an object, got a list"),
    ({"items": [{"id": "a", "text": "a", "metadata": {"a": {"secret": 1}}}]}, "items[0]", "one flat object"),
    ({"items": [{"id": "a", "text": "a", "metadata": {"a": 1 << 63}}]}, "items[0]", "64-bit numbers"),
]


@pytest.mark.parametrize(("asked", "param", "said"), WRONG)
def test_wrong_items_change_nothing(within, settings, empty, asked, param, said):
    async def body(here):
        answer = await here.post(asked, path="/v1/items")
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert said in error["message"]
        assert "secret" not in error["message"]

    within(settings, body)
    with mt.Index.open(empty, read_only=True) as index:
        assert len(index) == 0


def test_wrong_deletions(within, settings):
    async def body(here):
        for asked in ({}, {"ids": []}, {"ids": [5]}, {"ids": ["a", ""]}, {"ids": ["a"], "where": {}}):
            assert (await here.post(asked, path="/v1/items/delete")).status_code == 400, asked

    within(settings, body)


def test_a_disk_that_refuses_is_a_500_and_changes_nothing(within, settings, empty):
    app = create_app(settings)
    index = app.routes[0].app.service.searcher.index
    whole = index.upsert

    def full(*arguments):
        raise StorageError("no space left on /secret/place")

    async def body(here):
        assert (await put(here, [item(0)])).status_code == 200
        index.upsert = full
        answer = await put(here, [item(1)])
        assert answer.status_code == 500
        assert "secret" not in answer.text
        index.upsert = whole
        assert (await put(here, [item(2)])).status_code == 200

    within(app, body)
    with mt.Index.open(empty, read_only=True) as opened:
        assert len(opened) == 2


def test_where_it_is_not_allowed(within, static_model, empty, settings):
    async def closed(here):
        answer = await put(here, [item(0)])
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert "/v1/items" not in (await here.http.get("/openapi.json")).json()["paths"]

    async def without(here):
        assert (await put(here, [item(0)])).json()["error"]["code"] == "not_found"

    async def twice(here):
        with pytest.raises(LockedError):
            create_app(settings)

    within(Settings(model=str(static_model), index=str(empty), access_log=False), closed)
    within(Settings(model=str(static_model), access_log=False), without)
    within(settings, twice)
    for more in ({"index": str(empty), "workers": 2}, {}):
        with pytest.raises(InputError, match="writable needs an index, and one worker"):
            Settings(model=str(static_model), writable=True, **more)


def test_the_openapi_document_says_what_is_taken(within, settings):
    async def body(here):
        paths = (await here.http.get("/openapi.json")).json()["paths"]
        takes = Draft202012Validator(paths["/v1/items"]["post"]["requestBody"]["content"]["application/json"]["schema"])
        takes.validate({"items": [item(0, section="mail"), item(1)]})
        for asked, _, _ in WRONG[:10]:
            assert not takes.is_valid(asked) or asked["items"][-1]["text"] == " ", asked

    within(settings, body)


def test_what_was_acknowledged_survives_kill_9(serve, static_model, empty):
    one = serve(static_model, "--index", empty, "--writable")
    with one.openai() as client:
        for n in range(5):
            body = {"items": [item(2 * n), item(2 * n + 1)]}
            assert client.post("/items", body=body, cast_to=object)["written"] == 2
    one.stop(signal.SIGKILL)
    with mt.Index.open(empty) as index:
        assert len(index) == 10
        assert index.check().ok
    assert json.dumps(one.lines).count("game number") == 0
