import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from matryo.core.metrics import Judgements
from matryo.core.prefix import Nesting
from matryo.core.records import Retrieval, ScoredPairs


class WordModel:
    """A bag of hashed words: texts that share words are close. Counts how often it is asked."""

    def __init__(self, full: int = 32, nesting: Nesting | None = None, name: str = "words", salt: str = "") -> None:
        self.width, self.nesting, self.name, self.depths, self.salt = full, nesting, name, (), salt
        self.encoded: list[int] = []

    def encode(self, texts, width=None, depth=None, code="float32", batch_size=64, progress=False):
        self.encoded.append(len(texts))
        return np.stack([sum(self._word(word) for word in text.split()) for text in texts]).astype(np.float32)

    def _word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b((self.salt + word).encode(), digest_size=4).digest(), "big")
        return np.random.default_rng(seed).standard_normal(self.width)


@pytest.fixture
def retrieval() -> Retrieval:
    rng = np.random.default_rng(0)
    documents = [" ".join(f"w{n}" for n in rng.choice(60, 6, replace=False)) for _ in range(80)]
    queries = [" ".join(documents[n].split()[:2]) for n in range(40)]
    judged = Judgements(np.arange(40), np.arange(40), np.ones(40), 40)
    return Retrieval("toy", queries, [f"q{n}" for n in range(40)], documents, [f"d{n}" for n in range(80)], judged)


@pytest.fixture
def pairs() -> ScoredPairs:
    rng = np.random.default_rng(1)
    first, second, scores = [], [], []
    for _ in range(50):
        words, shared = [f"w{n}" for n in rng.choice(40, 8, replace=False)], int(rng.integers(0, 5))
        first.append(" ".join(words[:4]))
        second.append(" ".join(words[4 - shared : 8 - shared]))
        scores.append(float(shared))
    return ScoredPairs("toy pairs", first, second, np.array(scores))


@pytest.fixture
def model() -> WordModel:
    return WordModel(nesting=Nesting([4, 8, 32]))


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("MATRYO_SHARED", Path(__file__).parents[2].parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"the real data sets are not at {folder}; set MATRYO_SHARED to the folder that holds data/")
    return folder
