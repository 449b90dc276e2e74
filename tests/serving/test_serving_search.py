"""`POST /v1/search` gives what `Index.search` gives, and the OpenAPI document says what is sent and taken."""

import json

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

import matryo as mt
from matryo.core.errors import InputError
from matryo.encoders.folder import fingerprint
from matryo.serving import Settings, create_app

QUERIES = ["game for the terminal", "library for images"]


@pytest.fixture(scope="session")
def index(static_model, debian_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes") / "docs.matryo"
    model = mt.load(static_model)
    texts = [row["positive"] for row in debian_rows]
    made_by = {"name": str(static_model)} | fingerprint(str(static_model))
    with mt.Index.create(folder, width=48, plan="16:binary keep 40 > 48:float32", model=made_by) as index:
        metadata = [{"section": ("games", "libs")[n % 2]} for n in range(len(texts))]
        index.upsert([f"d{n}" for n in range(len(texts))], model.encode(texts), texts, metadata)
    return folder


@pytest.fixture
def settings(static_model, index):
    return Settings(model=str(static_model), index=str(index), access_log=False)


def ask(here, query, **more):
    return here.post({"query": query, **more}, path="/v1/search")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 3, "explain": True},
        {"plan": "48:float32", "k": 5, "explain": True},
        {"where": {"section": "games"}, "k": 4},
        {"where": {"section": {"in": ["libs"]}}, "plan": "8:int8 keep 100 > 48:float32", "explain": True},
    ],
)
def test_search_is_the_indexs_own(within, settings, static_model, index, options):
    with mt.Index.open(index, read_only=True) as opened:
        expected = opened.search(mt.load(static_model).encode(QUERIES), **options)
        own = opened.stats()["plan"]

    async def body(here):
        answer = await ask(here, QUERIES, **options)
        found = answer.json()
        assert answer.status_code == 200, found
        assert [[hit["id"] for hit in one["hits"]] for one in found["data"]] == expected.ids
        for one, scores, texts, more in zip(
            found["data"], expected.scores, expected.documents, expected.metadata, strict=True
        ):
            np.testing.assert_allclose([hit["score"] for hit in one["hits"]], scores, atol=1e-6)
            assert [hit["document"] for hit in one["hits"]] == texts
            assert [hit["metadata"] for hit in one["hits"]] == more
        assert found["plan"] == options.get("plan", own)
        assert found["usage"]["total_tokens"] == sum(len(text.split()) for text in QUERIES)
        assert ("explanation" in found) == options.get("explain", False)
        if options.get("explain"):
            assert [stage["stage"] for stage in found["explanation"]] == [s.stage for s in expected.explanation]
        assert "search;dur=" in answer.headers["server-timing"]
        one = (await ask(here, QUERIES[0], **options)).json()
        assert [hit["id"] for hit in one["data"][0]["hits"]] == expected.ids[0]

    within(settings, body)


REFUSED = [
    ({"query": ""}, "query[0]"),
    ({"query": []}, "query"),
    ({"query": None}, "query"),
    ({"query": ["mail", 3]}, "query[1]"),
    ({"query": {"text": "mail"}}, "query"),
    ({"k": 0}, "k"),
    ({"k": 1001}, "k"),
    ({"k": True}, "k"),
    ({"k": "3"}, "k"),
    ({"plan": "nonsense"}, "plan"),
    ({"plan": 3}, "plan"),
    ({"plan": "96:float32"}, "plan"),
    ({"plan": "48:binary"}, None),
    ({"where": "section"}, "where"),
    ({"where": []}, "where"),
    ({"where": {"section": {"~": 1}}}, "where"),
    ({"where": {'a"b': 1}}, "where"),
    ({"where": {"or": [{"section": "games"}] * 1200}}, "where"),
    ({"explain": "yes"}, "explain"),
    ({"explain": 1}, "explain"),
    ({"model": "other"}, "model"),
    ({"vector": [1.0]}, "vector"),
    ({"user": 3}, "user"),
]


def test_wrong_searches_are_told_what_is_wrong(within, settings):
    async def body(here):
        for change, param in REFUSED:
            answer = await here.post({"query": "mail", **change}, path="/v1/search")
            if param is None:
                assert answer.status_code == 200
                continue
            assert answer.status_code == (404 if param == "model" else 400), (change, answer.text)
            assert answer.json()["error"]["param"] == param, change

    within(settings, body)


def test_without_an_index_there_is_no_search(within, static_model):
    async def body(here):
        answer = await ask(here, "mail")
        assert answer.status_code == 404
        assert "without --index" in answer.json()["error"]["message"]
        assert "/v1/search" not in (await here.http.get("/openapi.json")).json()["paths"]

    within(Settings(model=str(static_model), access_log=False), body)


def test_an_index_of_another_model_is_refused(index, static_model, tmp_path):
    for width, said in ((64, "holds vectors of width 64 and the model gives 48"), (48, "was built by another model")):
        folder = tmp_path / f"{width}.matryo"
        mt.Index.create(folder, width=width, model={"name": "other", "blake2b": "00"}).close()
        with pytest.raises(InputError, match=said):
            create_app(Settings(model=str(static_model), index=str(folder)))
    with pytest.raises(InputError, match="holds no index"):
        create_app(Settings(model=str(static_model), index=str(tmp_path / "none")))


def test_commits_of_another_process_are_seen(within, settings, static_model, index):
    async def body(here):
        with mt.Index.open(index) as writer:
            writer.upsert(["new"], mt.load(static_model).encode(["game game terminal"]), ["fresh"])
            found = (await ask(here, "game game terminal", k=1)).json()["data"][0]["hits"][0]
            assert (found["id"], found["document"], found["metadata"]) == ("new", "fresh", None)
            writer.delete(["new"])
        assert (await ask(here, "game game terminal", k=1)).json()["data"][0]["hits"][0]["id"] != "new"

    within(settings, body)


def test_the_openapi_document_is_right(within, settings):
    async def body(here):
        document = (await here.http.get("/openapi.json")).json()
        validate(document)

        def check(schema, content):
            Draft202012Validator({**schema, "components": document["components"]}).validate(content)

        def schemas(path, method):
            operation = document["paths"][path][method]
            taken = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            sent = {s: one["content"]["application/json"]["schema"] for s, one in operation["responses"].items()}
            return taken, sent

        for path, asked in (
            ("/v1/embeddings", {"model": "words", "input": "mail", "dimensions": 9}),
            ("/v1/embeddings", {"model": "words", "input": ["mail"], "output_dtype": "int8"}),
            ("/v1/embeddings", {"model": "words", "input": ["mail"], "encoding_format": "base64", "user": None}),
            ("/v1/search", {"query": "mail", "k": 2, "explain": True, "where": {"section": "games"}}),
            ("/v1/search", {"query": ["mail", "game"], "plan": "48:float32"}),
            ("/v1/search", {"vector": [1.0] * 48, "dimensions": 9, "explain": True}),
        ):
            taken, sent = schemas(path, "post")
            check(taken, asked)
            answer = await here.post(asked, path=path)
            assert answer.status_code == 200, answer.text
            check(sent["200"], answer.json())
        for wrong in ({"model": "words"}, {"model": "words", "input": "mail", "dimensions": 49}, {"flavour": 1}):
            taken, sent = schemas("/v1/embeddings", "post")
            assert not Draft202012Validator({**taken, "components": document["components"]}).is_valid(wrong)
            answer = await here.post(wrong)
            check(sent[str(answer.status_code)], answer.json())
        for path in ("/v1/models", "/v1/models/words", "/v1/index", "/health", "/ready"):
            answer = await here.http.get(path)
            check(schemas(path.replace("/words", "/{model}"), "get")[1]["200"], answer.json())
        paths = {route.path.replace(":path", "") for route in here.app.routes}
        assert set(document["paths"]) == paths - {"/openapi.json", "/", "/page/{name}"}

    within(settings, body)


def test_search_over_http_with_a_key_file(serve, static_model, index, python, tmp_path):
    made = python("-m", "matryo", "key", tmp_path / "keys.json", "--name", "web").stdout.strip()
    one = serve(static_model, "--index", index, "--api-keys", tmp_path / "keys.json")
    with one.openai(api_key=made) as client:
        found = client.post("/search", body={"query": "game", "k": 2}, cast_to=object)
        assert len(found["data"][0]["hits"]) == 2
    assert one.stop() == 0
    assert made not in one.said
    assert [line["key"] for line in one.lines if line["event"] == "request"] == ["web"]
    assert json.loads((tmp_path / "keys.json").read_text())["keys"][0]["scopes"] == ["search"]
