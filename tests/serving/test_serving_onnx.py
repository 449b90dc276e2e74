"""Transformers without torch: an export gives sentence-transformers' vectors, alone, in any batch, and over HTTP."""

import json
import shutil

import numpy as np
import pytest

import matryo as mt
from matryo.core.errors import DamagedError, FormatError, InputError
from matryo.core.files import digest
from matryo.encoders.export import export_onnx, overlap
from matryo.encoders.int8 import _doubling, quantise
from matryo.serving import Settings
from matryo.serving.engines import choose

TEXTS = [
    "a puzzle game for the terminal",
    "Library for reading PNG images",
    "ß, Ünïcode and 漢字 names",
    " ".join(["many words of one text"] * 30),
    "x",
]

WITHOUT_TORCH = """
import sys
import numpy as np
import matryo as mt
np.save(sys.argv[2], mt.load(sys.argv[1]).encode(["a puzzle game", "mail"], width=32))
assert not {"torch", "transformers", "sentence_transformers", "onnx", "faiss"} & set(sys.modules), sys.modules.keys()
"""


@pytest.fixture(scope="session")
def plain(minilm):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm), device="cpu")


def test_vectors_are_sentence_transformers(exported, plain):
    model = mt.load(exported)
    expected = plain.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=1), model.encode(TEXTS, batch_size=5), atol=1e-6)
    for width in (1, 32, 383):
        cut = plain.encode(TEXTS, truncate_dim=width, normalize_embeddings=True)
        np.testing.assert_allclose(model.encode(TEXTS, width=width), cut, atol=1e-5)


def test_long_texts_are_cut_as_there(exported, plain):
    text = "one two three four five " * 100
    np.testing.assert_allclose(mt.load(exported).encode([text]), plain.encode([text]), atol=1e-5)


def test_tokens_are_counted_in_full_and_cut_with_the_last_special_one(exported, plain):
    engine = choose(str(exported), "auto", 1).engine
    text = "one two three four five " * 100
    (ids,) = engine.tokens([text])
    assert len(ids) == 502
    assert engine.cut(ids, 256) == plain.tokenizer([text], truncation=True, max_length=256)["input_ids"][0]
    assert engine.cut(ids[:5], 256) == ids[:5]


def test_it_loads_without_torch(exported, plain, python, tmp_path):
    ran = python("-c", WITHOUT_TORCH, exported, tmp_path / "found.npy")
    assert ran.returncode == 0, ran.stderr
    expected = plain.encode(["a puzzle game", "mail"], truncate_dim=32, normalize_embeddings=True)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-5)


def test_served_vectors_and_token_counts(within, exported, plain):
    async def body(here):
        asked = {"model": "minilm", "input": TEXTS, "dimensions": 96}
        found = (await here.post(asked)).json()
        expected = plain.encode(TEXTS, truncate_dim=96, normalize_embeddings=True)
        np.testing.assert_allclose([one["embedding"] for one in found["data"]], expected, atol=1e-5)
        counted = sum(map(len, plain.tokenizer(TEXTS)["input_ids"]))
        assert found["usage"]["prompt_tokens"] == counted
        long = "one two three four five " * 100
        error = (await here.post({"model": "minilm", "input": long})).json()["error"]
        assert "has 502 tokens; this model takes 256" in error["message"]
        cut = (await here.post({"model": "minilm", "input": long, "truncate": "end"})).json()
        np.testing.assert_allclose(cut["data"][0]["embedding"], plain.encode(long), atol=1e-5)
        assert cut["usage"]["total_tokens"] == 256

    within(Settings(model=str(exported), access_log=False), body)


def test_torch_and_export_agree_and_say_why(within, exported, minilm):
    rows = []

    async def body(here):
        found = (await here.post({"model": "one", "input": TEXTS, "depth": 6})).json()
        rows.append([one["embedding"] for one in found["data"]])
        (told,) = (await here.http.get("/v1/models")).json()["data"]
        assert told["depths"] == [6]
        for depth in (3, True, "6", 6.0):
            refused = await here.post({"model": "one", "input": TEXTS, "depth": depth})
            assert refused.status_code == 400
            assert "trained at its full depth only: 'depth' must be 6" in refused.json()["error"]["message"]

    for model in (exported, minilm):
        within(Settings(model=str(model), name="one", access_log=False), body)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)
    quick, slow = choose(str(exported), "auto", 1), choose(str(minilm), "auto", 1)
    assert quick.engine.name == "onnx"
    assert "without torch" in quick.reason
    assert slow.engine.name == "torch"
    assert "matryo export" in slow.reason
    assert quick.digest == slow.digest


def test_backends_that_do_not_fit(exported, minilm, static_model):
    for model, backend, said in (
        (exported, "torch", "cannot run it"),
        (exported, "static", "cannot run it"),
        (minilm, "onnx", "make one with: matryo export"),
        (minilm, "static", "is not a static model"),
        (static_model, "onnx", "is no export"),
        (static_model, "torch", "is a static model"),
    ):
        with pytest.raises(InputError, match=said):
            choose(str(model), backend, 1)


def test_openvino_agrees(exported, plain):
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    engine = choose(str(exported), "openvino", 1).engine
    from matryo.serving.engines import Tokens

    rows = engine.vectors([Tokens(ids, None) for ids in engine.tokens(TEXTS)])
    np.testing.assert_allclose(rows, plain.encode(TEXTS), atol=1e-5)


def test_damage_is_found(exported, tmp_path):
    for name in ("model.onnx", "tokenizer.json"):
        folder = shutil.copytree(exported, tmp_path / name)
        with (folder / name).open("r+b") as stream:
            stream.seek(1000)
            stream.write(b"\xff\x00")
        with pytest.raises(DamagedError, match="its digest differs"):
            mt.load(folder)
    about = json.loads((exported / "onnx.json").read_text())
    (folder / "onnx.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(FormatError, match="reads format 1"):
        mt.load(folder)
    (folder / "onnx.json").write_text("{}")
    with pytest.raises(DamagedError, match="export the model again"):
        mt.load(folder)


def test_exports_that_are_refused_leave_nothing(minilm, static_model, exported, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is there already"):
        export_onnx(minilm, exported)
    with pytest.raises(InputError, match="runs without torch as it is"):
        export_onnx(static_model, out)
    with pytest.raises(InputError, match="give at least 100"):
        export_onnx(minilm, out, int8=True, texts=["one"])
    assert list(tmp_path.iterdir()) == []


def test_products_are_left_by_doubling():
    assert [_doubling(n) for n in (0, 1, 2, 6, 8)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 4, 6], [0, 1, 2, 4, 8]]


def test_overlap_of_neighbours():
    rows = np.eye(30, dtype=np.float32) + np.random.default_rng(0).random((30, 30), dtype=np.float32)
    assert overlap(rows, rows) == 1
    assert overlap(rows, rows[::-1].copy()) < 0.6


def test_int8_vectors_do_not_depend_on_their_batch(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "int8")
    quantise(exported / "model.onnx", folder / "model.onnx")
    about = json.loads((folder / "onnx.json").read_text())
    about["files"]["model.onnx"] = digest(folder / "model.onnx")
    (folder / "onnx.json").write_text(json.dumps(about))
    model, texts = mt.load(folder), TEXTS * 4
    alone = model.encode(texts, batch_size=1)
    for size in (2, 3, 20):
        np.testing.assert_allclose(model.encode(texts, batch_size=size), alone, atol=1e-6)
    cosines = (alone * mt.load(exported).encode(texts)).sum(axis=1)
    assert 0.98 < cosines.min() < 1 - 1e-5


@pytest.mark.slow
def test_int8_is_judged_by_neighbours_at_the_narrowest_width(minilm, debian_rows, tmp_path):
    texts = [row["positive"] for row in debian_rows]
    with pytest.raises(InputError, match=r"int8 keeps 0\.\d+ of the 10 nearest neighbours at width 384, below 0\.999"):
        export_onnx(minilm, tmp_path / "no", int8=True, texts=texts, floor=0.999)
    assert list(tmp_path.iterdir()) == []
    found = export_onnx(minilm, tmp_path / "yes", int8=True, texts=texts, floor=0.8)
    assert 0.8 <= found["overlap"] < 1
    assert found["bytes"] < 30e6
    assert found["float32_products"] == 0
    # What all of it in int8 does not reach is reached by leaving the second product of the first blocks as it is.
    part = export_onnx(minilm, tmp_path / "part", int8=True, texts=texts, floor=found["overlap"] + 0.001)
    assert part["float32_products"] in (1, 2, 4, 6)
    assert part["overlap"] > found["overlap"]
    assert json.loads((tmp_path / "part" / "onnx.json").read_text())["float32_products"] == part["float32_products"]
    assert not list((tmp_path / "part").glob("fp32*"))
    assert mt.load(tmp_path / "yes").encode(["mail"]).shape == (1, 384)
