"""An index in a database is served like one in a folder; when the database is away callers are told to come back."""

import matryo as mt
from matryo.encoders.folder import fingerprint
from matryo.engines import base
from matryo.serving import Settings


def test_an_index_behind_a_url_and_its_database_gone(
    within, static_model, debian_rows, tmp_path, postgres_of, monkeypatch
):
    monkeypatch.setattr(base, "FIRST_WAIT", 0.001)
    server = postgres_of(tmp_path / "data")
    url, model = server.url("served"), mt.load(static_model)
    texts = [row["positive"] for row in debian_rows[:60]]
    made_by = {"name": str(static_model)} | fingerprint(str(static_model))
    with mt.Index.create(url, width=48, model=made_by) as index:
        index.upsert([f"d{n}" for n in range(60)], model.encode(texts), texts)
        expected = index.search(model.encode(["game for the terminal"]), k=3).ids

    async def body(here):
        asked = {"query": "game for the terminal", "k": 3}
        found = (await here.post(asked, path="/v1/search")).json()
        assert [[hit["id"] for hit in one["hits"]] for one in found["data"]] == expected
        assert (await here.http.get("/v1/index")).json()["items"] == 60
        item = {"id": "new", "text": "a game of chess for the terminal"}
        assert (await here.post({"items": [item]}, path="/v1/items")).json()["written"] == 1
        server.stop()
        for path, content in (("/v1/search", asked), ("/v1/items", {"items": [item]})):
            answer = await here.post(content, path=path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "index_unavailable")
            assert answer.headers["retry-after"] == "5"

    settings = Settings(model=str(static_model), index=url, writable=True, access_log=False)
    within(settings, body)
