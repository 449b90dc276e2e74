"""The demo end to end, with the quality it promises."""

import json

import pytest

from matryo.demo import demo

PROMISED = {16: 0.36, 32: 0.55, 64: 0.67, 128: 0.735, 256: 0.765, 512: 0.78}


@pytest.mark.slow
def test_demo_keeps_its_promises(tmp_path):
    lines = []
    page = demo(tmp_path / "demo", lines.append)
    text = page.read_text()
    assert "<svg" in text
    assert "<script" not in text
    assert "The same questions at several widths" in text
    rows = json.loads((tmp_path / "demo/report.json").read_text())["rows"]
    quality = {
        row["width"]: row["value"]
        for row in rows
        if row["model"] == "nested" and row["code"] == "float32" and row["metric"] == "nDCG@10"
    }
    for width, least in PROMISED.items():
        assert quality[width] >= least
