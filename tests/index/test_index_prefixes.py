"""Search by a prefix alone gives what a plain sort of prefix cosines gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import matryo as mt
from matryo.core.errors import InputError
from matryo.core.prefix import truncate
from matryo.index import prefixes

N, D = 400, 24


@pytest.fixture(scope="module")
def rows():
    rows = np.random.default_rng(3).standard_normal((N, D)).astype(np.float32)
    rows[50:60] = rows[40:50]  # equal rows: the lower comes first
    rows[70:73, :4] = 0  # prefixes of nothing
    return rows


@pytest.fixture(scope="module", params=["float16", "float32"])
def index(request, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefixes") / "i.matryo"
    with mt.Index.create(folder, width=D, store=request.param) as index:
        metadata = [{"half": n % 2} for n in range(N)]
        index.upsert([str(n) for n in range(N)], rows, [None] * N, metadata)
        index.delete(["7", "41", "399"])
        yield index


def slow(index, rows, query, width, k, allowed):
    stored = truncate(rows, D).astype(index.stats()["store"]).astype(np.float32)
    unit = truncate(truncate(query[None], D), width)[0]
    prefixes = truncate(stored[:, :width], width)
    scores = np.array([np.einsum("nd,d->n", row[None], unit)[0] for row in prefixes])
    order = [n for n in np.argsort(-scores, kind="stable") if allowed[n]][:k]
    return scores, scores[order]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, D - 1), st.integers(1, 450), st.integers(0, 99), st.booleans())
def test_a_prefix_search_is_a_plain_sort(index, rows, width, k, seed, filtered):
    query = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    allowed = ~np.isin(np.arange(N), (7, 41, 399)) & (~filtered | (np.arange(N) % 2 == 0))
    hits = index.search(query, k=k, width=width, where={"half": 0} if filtered else None, explain=True)
    own, best = slow(index, rows, query, width, k, allowed)
    found = [int(one) for one in hits.ids[0]]
    assert len(set(found)) == len(found)
    assert allowed[found].all()
    np.testing.assert_allclose(hits.scores[0], best, atol=1e-6)
    np.testing.assert_allclose(own[found], best, atol=1e-6)  # rounding may order what all but ties
    for low, high in zip(range(40, 50), range(50, 60), strict=True):
        if low in found and high in found:
            assert found.index(low) < found.index(high)
    assert [(stage.stage, stage.kept) for stage in hits.explanation] == [(f"{width}:float32", len(found))]


def test_many_queries_at_once_and_the_full_width(index, rows):
    some = rows[:5] + rows[100:105]
    many = index.search(some, k=7, width=9)
    for n, query in enumerate(some):
        assert many.ids[n] == index.search(query, k=7, width=9).ids[0]
    full, plan = index.search(some, k=7, width=D), index.search(some, k=7, plan=f"{D}:float32")
    assert (full.ids, full.scores) == (plan.ids, plan.scores)
    assert f"5:{'float32'}" not in index.stats()["codes"]


def test_wrong_widths_are_refused(index, rows):
    for width, said in ((0, "outside 1..24"), (25, "outside 1..24"), (True, "must be an integer"), (2.0, "an integer")):
        with pytest.raises(InputError, match=said):
            index.search(rows[0], width=width)
    with pytest.raises(InputError, match="give one of the two"):
        index.search(rows[0], width=4, plan="24:float32")


def test_a_query_whose_prefix_is_nothing_scores_nothing(index):
    query = np.zeros(D, np.float32)
    query[-1] = 1
    hits = index.search(query, k=3, width=4)
    assert hits.ids[0] == ["0", "1", "2"]
    assert hits.scores[0] == [0.0, 0.0, 0.0]


def test_an_empty_index_answers_nothing(tmp_path):
    with mt.Index.create(tmp_path / "i", width=4) as index:
        assert index.search(np.ones(4), width=2).ids == [[]]


def test_blocks_of_queries_change_nothing(index, rows, monkeypatch):
    queries = rows[:7] + 0.1
    whole = index.search(queries, k=5, width=8)
    monkeypatch.setattr(prefixes, "COSTS_AT_A_TIME", 2 * N)
    assert index.search(queries, k=5, width=8) == whole


def test_a_promise_of_the_full_width_is_none_of_a_prefix(tmp_path, rows):
    with mt.Index.create(tmp_path / "i.matryo", width=D, plan=f"{D}:float32") as index:
        index.upsert([str(n) for n in range(N)], rows)
        index.calibrate(rows[:300] + 0.1, recall=0.9)
        assert index.search(rows[0], explain=True).promise.startswith("expected recall")
        said = index.search(rows[0], width=8, explain=True).promise
        assert said == f"nothing is promised of this plan; '{D}:float32' was calibrated"
