"""`POST /v1/embeddings`: OpenAI's contract by OpenAI's client, every width, every code."""

import base64

import numpy as np
import openai
import pytest

import matryo as mt
from matryo.serving import Settings
from matryo.serving.embeddings import coded

TEXTS = ["a puzzle game for the terminal", "library for reading png images", "a mail server and more"]


@pytest.fixture
def settings(static_model):
    return Settings(model=str(static_model), access_log=False)


def test_every_width_by_the_official_client(within, settings, static_model):
    model = mt.load(static_model)
    full = model.encoder.vectors(TEXTS).astype(np.float64)

    async def body(here):
        for width in range(1, model.width + 1):
            got = await here.openai().embeddings.create(model="words", input=TEXTS, dimensions=width)
            rows = np.array([one.embedding for one in got.data])
            assert [one.index for one in got.data] == [0, 1, 2]
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
            prefix = full[:, :width]
            np.testing.assert_allclose(rows, prefix / np.linalg.norm(prefix, axis=1, keepdims=True), atol=1e-6)

    within(settings, body)


def test_answer_is_the_contracts(within, settings, static_model):
    counted = sum(len(text.split()) for text in TEXTS)

    async def body(here):
        plain = await here.post({"model": "words", "input": TEXTS, "encoding_format": "float"})
        found = plain.json()
        assert plain.status_code == 200
        assert set(found) == {"object", "data", "model", "usage"}
        assert found["object"] == "list"
        assert found["model"] == "words"
        assert found["usage"] == {"prompt_tokens": counted, "total_tokens": counted}
        assert set(found["data"][0]) == {"object", "index", "embedding"}
        coded = (await here.post({"model": "words", "input": TEXTS, "encoding_format": "base64"})).json()
        for one, other in zip(found["data"], coded["data"], strict=True):
            row = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
            np.testing.assert_array_equal(np.float32(one["embedding"]), row)
        single = (await here.post({"model": "words", "input": TEXTS[0]})).json()
        assert single["data"] == found["data"][:1]

    within(settings, body)


def test_headers_tell_number_and_times(within, settings):
    async def body(here):
        mine = await here.post({"model": "words", "input": "mail"}, headers={"x-request-id": "abc-1"})
        assert mine.headers["x-request-id"] == "abc-1"
        assert {part.split(";")[0] for part in mine.headers["server-timing"].split(", ")} == {
            "queue",
            "model",
            "write",
            "total",
        }
        other = await here.post({"model": "words", "input": "mail"}, headers={"x-request-id": "a b\tc" * 30})
        assert len(other.headers["x-request-id"]) == 16

    within(settings, body)


@pytest.mark.parametrize("name", ["dimensions", "output_dimension", "dimensionality", "truncate_dim"])
def test_width_by_any_of_its_names(within, settings, name):
    async def body(here):
        found = (await here.post({"model": "words", "input": "mail", name: 5})).json()
        assert len(found["data"][0]["embedding"]) == 5

    within(settings, body)


def test_strict_widths_allow_trained_ones_and_the_full_one(within, static_model):
    async def body(here):
        for width in (8, 16, 32, 48):
            assert (await here.post({"model": "words", "input": "mail", "dimensions": width})).status_code == 200
        refused = (await here.post({"model": "words", "input": "mail", "dimensions": 9})).json()["error"]
        assert refused["param"] == "dimensions"
        assert "8, 16, 32, 48; got 9" in refused["message"]

    within(Settings(model=str(static_model), strict_widths=True, access_log=False), body)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_codes_decode_to_the_vectors(within, settings, static_model, dtype):
    unit = mt.load(static_model).encode(TEXTS, width=16)

    async def body(here):
        asked = {"model": "words", "input": TEXTS, "dimensions": 16, "output_dtype": dtype}
        data = (await here.post(asked)).json()["data"]
        codes = np.array([one["embedding"] for one in data])
        packed = (await here.post(asked | {"encoding_format": "base64"})).json()["data"]
        kind = np.int8 if dtype in ("int8", "binary") else np.uint8
        for one, row in zip(packed, codes, strict=True):
            np.testing.assert_array_equal(np.frombuffer(base64.b64decode(one["embedding"]), kind), row)
        if "binary" in dtype:
            bits = np.packbits(unit > 0, axis=1).astype(int)
            np.testing.assert_array_equal(codes, bits if dtype == "ubinary" else bits - 128)
        else:
            scale = np.array([[one["scale"]] for one in data])
            np.testing.assert_allclose(
                (codes - (128 if dtype == "uint8" else 0)) * scale, unit, atol=scale.max() / 1.99
            )
            assert np.abs(codes - (128 if dtype == "uint8" else 0)).max() == 127

    within(settings, body)


def test_codes_of_all_signs():
    rows = np.array([[0.6, -0.8], [-1.0, 0.0]], np.float32)
    codes, scales = coded(rows, "int8")
    np.testing.assert_array_equal(codes, [[95, -127], [-127, 0]])
    np.testing.assert_array_equal(coded(rows, "uint8")[0], [[223, 1], [1, 128]])
    np.testing.assert_allclose(codes * scales[:, None], rows, atol=0.004)


def test_token_ids_are_refused_with_the_clients_switch(within, settings, static_model):
    async def refused(here):
        for ids in ([1, 2, 3], [[1, 2], [3]]):
            error = (await here.post({"model": "words", "input": ids})).json()["error"]
            assert error["code"] == "token_input_refused"
            assert "check_embedding_ctx_length=False" in error["message"]

    async def allowed(here):
        ids = [[5, 6, 7], [8]]
        found = (await here.post({"model": "words", "input": ids})).json()
        model = mt.load(static_model)
        unit = mt.truncate(model.encoder.means(ids), model.width)
        np.testing.assert_allclose([one["embedding"] for one in found["data"]], unit, atol=1e-6)
        assert found["usage"]["total_tokens"] == 4
        for bad in ([[5], []], [[5], [400]], [[-1]], [[5], "text"], [[True]], [5, 2.0], [[10**30]]):
            assert (await here.post({"model": "words", "input": bad})).status_code == 400

    within(settings, refused)
    within(Settings(model=str(static_model), token_ids=True, access_log=False), allowed)


REFUSED = [
    ({"model": None}, "model", "required"),
    ({"model": "other"}, "model", "No such model here; this server has 'words'"),
    ({"model": 3}, "model", "must be a text, got an integer"),
    ({"input": None}, "input", "got null"),
    ({"input": ""}, "input[0]", "is empty"),
    ({"input": []}, "input", "empty list"),
    ({"input": ["mail", " \t"]}, "input[1]", "is empty"),
    ({"input": ["mail", 3]}, "input[1]", "must be a text, got an integer"),
    ({"input": {"text": "mail"}}, "input", "got an object"),
    ({"input": ["mail"] * 2049}, "input", "2049 entries; at most 2048"),
    ({"dimensions": 0}, "dimensions", "an integer in 1..48, got 0"),
    ({"dimensions": 49}, "dimensions", "an integer in 1..48, got 49"),
    ({"dimensions": -10}, "dimensions", "an integer in 1..48, got -10"),
    ({"dimensions": True}, "dimensions", "got a boolean"),
    ({"dimensions": "8"}, "dimensions", "got a text"),
    ({"dimensions": 8.0}, "dimensions", "got a number"),
    ({"dimensions": 8, "truncate_dim": 9}, "dimensions", "disagree"),
    ({"encoding_format": "hex"}, "encoding_format", "float, base64"),
    ({"encoding_format": ["float"]}, "encoding_format", "float, base64"),
    ({"user": 7}, "user", "must be a text"),
    ({"flavour": "new"}, "flavour", "Unknown field 'flavour'"),
    ({"a secret\n": "new"}, None, "unusual name"),
    ({"depth": 6}, "depth", "no layers to choose from"),
    ({"output_dtype": "int4"}, "output_dtype", "float, int8"),
    ({"output_dtype": "binary", "dimensions": 12}, "output_dtype", "multiple of 8, got 12; try 8"),
    ({"input_type": "poem"}, "input_type", "document, query"),
    ({"input_type": "query", "prompt_name": "document"}, "input_type", "disagree"),
    ({"truncate": "start"}, "truncate", "none, end"),
]


def test_wrong_requests_are_told_what_is_wrong(within, settings):
    async def body(here):
        for change, param, said in REFUSED:
            answer = await here.post({"model": "words", "input": "mail", **change})
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, change
            assert answer.status_code == (404 if error["code"] == "model_not_found" else 400), change
            assert error["type"] == "invalid_request_error"
            assert (error["param"], said in error["message"]) == (param, True), (change, error)
            assert answer.headers["x-should-retry"] == "false"
        missing = await here.post({"model": "words"})
        assert missing.json()["error"]["param"] == "input"

    within(settings, body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"a"', b'{"input": NaN}', b'{"input": "\\ud800"}', b"\xff", b"[" * 5000]
)
def test_what_is_not_json_is_refused(within, settings, body):
    async def ask(here):
        answer = await here.post(body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_json"

    within(settings, ask)


def test_limits_of_tokens_and_bytes(within, static_model):
    async def body(here):
        long = "mail " * 6
        error = (await here.post({"model": "words", "input": ["mail", long]})).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "input[1]"
        assert "has 6 tokens; this model takes 5" in error["message"]
        cut = (await here.post({"model": "words", "input": [long], "truncate": "end"})).json()
        assert cut["usage"]["total_tokens"] == 5
        error = (await here.post({"model": "words", "input": ["mail mail"] * 5})).json()["error"]
        assert error["code"] == "too_many_tokens"
        large = await here.post({"model": "words", "input": "x" * 2000})
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"

        async def endless():
            while True:
                yield b" " * 500

        answer = await here.http.post("/v1/embeddings", content=endless(), headers={"content-type": "application/json"})
        assert answer.status_code == 413

    limits = {"max_input_tokens": 5, "max_request_tokens": 9, "max_body_bytes": 1500}
    within(Settings(model=str(static_model), access_log=False, **limits), body)


def test_other_paths_methods_and_types_have_the_same_shape(within, settings):
    async def body(here):
        for answer, status in (
            (await here.http.get("/v1/embeddings"), 405),
            (await here.http.get("/nowhere"), 404),
            (await here.http.post("/health"), 405),
            (await here.http.post("/v1/embeddings", content=b"{}", headers={"content-type": "text/plain"}), 415),
            (await here.post(b"{}", headers={"content-encoding": "gzip"}), 415),
        ):
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert (await here.http.get("/v1/embeddings")).headers["allow"] == "POST"

    within(settings, body)


def test_models_say_widths_and_quality(within, settings):
    async def body(here):
        listed = await here.openai().models.list()
        assert [one.id for one in listed.data] == ["words"]
        found = (await here.http.get("/v1/models/words")).json()
        assert found["matryoshka_dimensions"] == [8, 16, 32, 48]
        assert found["embedding_size"] == 48
        assert found["quality"][0]["value"] == 0.5
        assert len(found["revision"]) == 32
        assert (await here.http.get("/v1/models/none")).json()["error"]["code"] == "model_not_found"
        assert (await here.http.get("/health")).json() == {"status": "ok"}
        assert (await here.http.get("/ready")).json() == {"status": "ready"}

    within(settings, body)


def test_a_real_server_and_the_official_client(served, static_model):
    unit = mt.load(static_model).encode(TEXTS, width=16)
    with served.openai() as client:
        got = client.embeddings.create(model="text-embedding-3-small", input=TEXTS, dimensions=16)
        np.testing.assert_allclose([one.embedding for one in got.data], unit, atol=1e-6)
        with pytest.raises(openai.BadRequestError, match=r"integer in 1\.\.48, got 99") as caught:
            client.embeddings.create(model="words", input=TEXTS, dimensions=99)
        assert caught.value.param == "dimensions"
        with pytest.raises(openai.NotFoundError, match="No such model here"):
            client.embeddings.create(model="gpt", input=TEXTS)
