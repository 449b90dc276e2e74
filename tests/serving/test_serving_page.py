"""The page's files over HTTP, searches by a vector and by a prefix, and what the server says of its index."""

import json
import re

import numpy as np
import pytest

import matryo as mt
from matryo.core.errors import InputError
from matryo.serving import Settings
from matryo.serving.files import POLICY, files
from matryo.serving.plans import read_plans

PLANS = {
    "best": {"planned": "16:binary keep 90 > 48:float32"},
    "items": 10**6,
    "k": 10,
    "recall": 0.9,
    "confidence": 0.95,
    "frontier": [
        {"planned": planned, "recall": 0.93, "bound": 0.91, "bytes_per_item": each}
        | {"predicted": {"ms": 1.5, "code_bytes": each * 1e6}}
        for planned, each in (("16:binary keep 90 > 48:float32", 2), ("32:int8 keep 20 > 48:float32", 32))
    ],
}


@pytest.fixture(scope="module")
def index(static_model, debian_rows, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("page") / "docs.matryo", mt.load(static_model)
    texts = [row["positive"] for row in debian_rows]
    with mt.Index.create(folder, width=48, plan="16:binary keep 40 > 48:float32") as index:
        index.upsert([f"d{n}" for n in range(len(texts))], model.encode(texts), texts)
    return folder


@pytest.fixture
def plans(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(PLANS))
    return path


def test_the_page_is_small_strict_and_asked_for_once(within, static_model):
    async def body(here):
        total = 0
        for name in files():
            path = "/" if name == "index.html" else f"/page/{name}"
            answer = await here.http.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["content-security-policy"] == POLICY
            assert answer.headers["x-content-type-options"] == "nosniff"
            again = await here.http.get(path, headers={"if-none-match": f'"other", W/{answer.headers["etag"]}'})
            assert (again.status_code, again.content) == (304, b"")
            total += len(answer.content)
            for named in re.findall(r'(?:src|href|from) ?=? ?"\.?(/[^"]+)"', answer.text):
                assert (named.removeprefix("/page").strip("/")) in files(), (name, named)
            assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in answer.text
        assert total <= 100_000
        first = (await here.http.get("/")).text
        assert not re.search(r"<style|style=|<script>|\son\w+=", first)
        assert (await here.http.get("/page/../about.py")).status_code == 404
        assert (await here.http.get("/page/nothing.js")).status_code == 404
        refused = await here.http.get("/", headers={"host": "evil.example"})
        assert refused.status_code == 403

    assert {"index.html", "main.js", "style.css"} <= set(files())
    for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"):
        assert part in POLICY
    assert "unsafe" not in POLICY
    within(Settings(model=str(static_model), access_log=False), body)


def test_a_vector_and_a_width_search_as_the_index_does(within, static_model, index):
    query = mt.load(static_model).encode(["game for the terminal"])
    with mt.Index.open(index, read_only=True) as opened:
        narrow, planned = opened.search(query, k=7, width=11, explain=True), opened.search(query, k=7)

    async def body(here):
        asked = {"model": "words", "input": "game for the terminal", "input_type": "query", "encoding_format": "base64"}
        coded = (await here.post(asked)).json()["data"][0]["embedding"]
        for given in ({"vector": coded}, {"vector": query[0].tolist()}, {"query": "game for the terminal"}):
            found = (await here.post({**given, "k": 7, "dimensions": 11, "explain": True}, path="/v1/search")).json()
            hits = found["data"][0]["hits"]
            assert [hit["id"] for hit in hits] == narrow.ids[0]
            np.testing.assert_allclose([hit["score"] for hit in hits], narrow.scores[0], atol=1e-6)
            assert (found["plan"], found["explanation"][0]["stage"]) == ("11:float32", "11:float32")
            found = (await here.post({**given, "k": 7}, path="/v1/search")).json()
            assert [hit["id"] for hit in found["data"][0]["hits"]] == planned.ids[0]

    within(Settings(model=str(static_model), index=str(index), access_log=False), body)


WRONG = [
    ({"vector": [1.0] * 47}, "vector", "48 numbers"),
    ({"vector": [1.0] * 47 + [True]}, "vector", "48 numbers"),
    ({"vector": [[1.0] * 48]}, "vector", "48 numbers"),
    ({"vector": {}}, "vector", "48 numbers"),
    ({"vector": "????"}, "vector", "base64"),
    ({"vector": "AAAA"}, "vector", "base64"),
    ({"vector": "\u00e9" * 256}, "vector", "base64"),
    ({"vector": [0.0] * 48}, "vector", "not all of them zero"),
    ({"vector": [1e300] + [0.0] * 47}, "vector", "finite"),
    ({"vector": [1.0] * 48, "query": "mail"}, "vector", "give it or 'query'"),
    ({"query": "mail", "dimensions": 0}, "dimensions", "1..48"),
    ({"query": "mail", "dimensions": 49}, "dimensions", "1..48"),
    ({"query": "mail", "dimensions": 8.0}, "dimensions", "1..48"),
    ({"query": "mail", "dimensions": 8, "plan": "48:float32"}, "plan", "one of the two"),
]


def test_wrong_vectors_and_widths_are_told_what_is_wrong(within, static_model, index):
    async def body(here):
        for asked, param, said in WRONG:
            answer = await here.post(asked, path="/v1/search")
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), (asked, error)
            assert said in error["message"]

    within(Settings(model=str(static_model), index=str(index), access_log=False), body)

    async def strict(here):
        answer = await here.post({"query": "mail", "dimensions": 9}, path="/v1/search")
        assert "trained widths only" in answer.json()["error"]["message"]

    within(Settings(model=str(static_model), index=str(index), access_log=False, strict_widths=True), strict)


def test_the_index_is_described_without_places_on_the_disk(within, static_model, index, plans):
    async def body(here):
        before = (await here.http.get("/v1/index")).json()
        assert (before["items"], before["width"], before["plan_bytes_per_item"]) == (300, 48, None)
        await here.post({"query": "mail"}, path="/v1/search")
        answer = await here.http.get("/v1/index")
        assert answer.json()["plan_bytes_per_item"] == 8  # 16 bits in a word of 64
        assert [one["plan"] for one in answer.json()["plans"]["plans"]] == [r["planned"] for r in PLANS["frontier"]]
        assert str(index.parent) not in answer.text

    within(Settings(model=str(static_model), index=str(index), plans=str(plans), access_log=False), body)

    async def alone(here):
        answer = await here.http.get("/v1/index")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")

    within(Settings(model=str(static_model), access_log=False), alone)


def test_with_keys_any_host_gets_the_page_and_no_data(within, static_model, tmp_path):
    from matryo.serving.keys import add_key

    add_key(tmp_path / "keys.json", "web", ("search",))

    async def body(here):
        assert (await here.http.get("/", headers={"host": "example.org"})).status_code == 200
        for path in ("/v1/models", "/v1/index"):
            assert (await here.http.get(path, headers={"host": "example.org"})).status_code == 401

    within(Settings(model=str(static_model), api_keys=str(tmp_path / "keys.json"), access_log=False), body)


def test_files_of_the_planner_are_read_and_checked(plans, tmp_path):
    found = read_plans(plans)
    assert [one["best"] for one in found["plans"]] == [True, False]
    assert (found["items"], found["k"]) == (10**6, 10)
    text = "plan: '16:binary keep 90 > 48:float32'\nk: 10\nrecall: 0.9\nconfidence: 0.95\n"
    text += "measured: {recall: 0.93, at_least: 0.91}\npredicted: {items: 1000, ms: 1.5, memory_bytes: 2000}\n"
    (tmp_path / "plan.yaml").write_text(text)
    one = read_plans(tmp_path / "plan.yaml")
    assert (one["items"], one["plans"][0]["memory_bytes"]) == (1000, 2000)
    for name, content, said in (
        ("a.json", "{}", "not a readable file of matryo plan"),
        ("a.json", "[1]", "not a readable file"),
        ("a.json", json.dumps(PLANS).replace("16:binary", "16:butter"), "unknown code 'butter'"),
        ("a.yaml", "a: [", "not a readable file"),
        ("a.yaml", "plan: 3", "not a readable file"),
        ("a.txt", "", "are read from .json, .yaml"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=said):
            read_plans(tmp_path / name)
    with pytest.raises(InputError, match="No such file"):
        read_plans(tmp_path / "none.json")


def test_a_plans_file_builds_an_index_too(plans):
    from matryo.cli.plan import plan_text

    assert plan_text(str(plans)) == PLANS["best"]["planned"]
    plans.write_text(json.dumps(PLANS | {"best": None}))
    with pytest.raises(InputError, match="holds no 'plan"):
        plan_text(str(plans))
