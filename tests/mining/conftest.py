import json
from pathlib import Path

import numpy as np
import pytest

from matryo.encoders import Card, Model


class Table:
    """An encoder that knows its texts by heart."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.known = vectors
        self.width = len(next(iter(vectors.values())))
        self.asked: list[str] = []

    def vectors(self, texts, batch_size, progress):
        self.asked += texts
        return np.array([self.known[text] for text in texts], np.float32)


@pytest.fixture
def model():
    def make(vectors: dict[str, list[float]]) -> Model:
        return Model(Table(vectors), Card("table"))

    return make


@pytest.fixture
def pairs(tmp_path):
    def write(*rows: tuple[str, ...], name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        named = [dict(zip(("anchor", "positive", "group"), row, strict=False)) for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in named))
        return path

    return write
