"""A model trained at several depths, served: the layers asked for are the layers that run."""

import asyncio

import numpy as np

from matryo.encoders import load
from matryo.serving import Settings

TEXTS = ["a puzzle game for the terminal", "mail server", "fonts"]


def rows(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]], np.float32)


def test_depth_is_what_runs(two_depths, within):
    model = load(two_depths, "cpu")

    async def body(here):
        told = (await here.http.get("/v1/models")).json()["data"][0]
        assert told["depths"] == [2, 4]
        assert {row["depth"] for row in told["quality_by_depth"]} == {2}
        # Side by side, so that one batch holds both depths and equal texts.
        asked = [{"model": "one", "input": TEXTS, "dimensions": 16, "depth": depth} for depth in (2, None, 4)]
        low, whole, deepest = (rows(a) for a in await asyncio.gather(*map(here.post, asked)))
        np.testing.assert_allclose(low, model.encode(TEXTS, width=16, depth=2), atol=1e-5)
        np.testing.assert_allclose(whole, model.encode(TEXTS, width=16), atol=1e-5)
        np.testing.assert_array_equal(whole, deepest)
        refused = await here.post({"model": "one", "input": TEXTS, "depth": 3})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "'depth' must be one of 2, 4."
        metrics = (await here.http.get("/metrics")).text
        assert 'matryo_request_seconds_count{depth="2",endpoint="embeddings",width="16"} 1.0' in metrics

    within(Settings(model=str(two_depths), name="one"), body)


def test_an_export_serves_its_one_depth(two_depths, within, tmp_path):
    from matryo.encoders.export import export_onnx
    from matryo.encoders.smaller import export_smaller

    export_smaller(two_depths, tmp_path / "low", depth=2)
    export_onnx(tmp_path / "low", tmp_path / "onnx")
    expected = load(two_depths, "cpu").encode(TEXTS, depth=2)

    async def body(here):
        assert (await here.http.get("/v1/models")).json()["data"][0]["depths"] == [2]
        np.testing.assert_allclose(rows(await here.post({"model": "one", "input": TEXTS})), expected, atol=1e-5)
        assert (await here.post({"model": "one", "input": TEXTS, "depth": 4})).status_code == 400

    within(Settings(model=str(tmp_path / "onnx"), name="one"), body)
