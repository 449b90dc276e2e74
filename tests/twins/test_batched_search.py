"""A matrix of queries gives what its rows give one by one, whatever the first stage does with them at once."""

import numpy as np
import pytest

from matryo.index import Index

N, D = 700, 64
PLANS = [
    "64:binary keep 60 > 64:float32",
    "32:int8 keep 60 > 64:int8 keep 30 > 64:float32",
    "32:pq8 keep 200 > 64:float32",
    "32:binary ivf(cells=1,probe=1) keep 150 > 64:float32",
    "32:int8 ivf(cells=6,probe=2) keep 60 > 64:float32",
    "32:rabitq keep 200 > 64:float32",
    "32:int8 hnsw(M=8,ef=40) keep 60 > 64:float32",
    "64:float32",
]


def drawn(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32) * np.arange(1, D + 1) ** -0.35


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    with Index.create(tmp_path_factory.mktemp("batched") / "i", width=D) as made:
        made.upsert([f"d{n}" for n in range(N)], drawn(N, 0), metadata=[{"m": n % 3, "f": n % 100} for n in range(N)])
        made.upsert(["again", "and again"], np.repeat(drawn(1, 0), 2, axis=0), metadata=[{"m": 1, "f": 0}] * 2)
        made.delete(["d5", "d17"])
        yield made


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("where", [None, {"m": 1}, {"f": 3}], ids=["all", "a third", "a hundredth"])
def test_a_matrix_of_queries_is_its_rows_one_by_one(index, plan, where):
    queries = np.concatenate([drawn(21, 1), drawn(2, 0)])
    got = index.search(queries, 10, plan=plan, where=where)
    ones = [index.search(query, 10, plan=plan, where=where) for query in queries]
    assert got.ids == [one.ids[0] for one in ones]
    assert got.scores == [one.scores[0] for one in ones]
    assert got.metadata == [one.metadata[0] for one in ones]
    assert index.search(queries[:0], 10, plan=plan, where=where).ids == []
