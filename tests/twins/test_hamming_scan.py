"""The n lowest costs, by a limit from a sample and piece by piece, are those of a sort, lower rows first of equals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_contract import Stored

from matryo.index import funnel
from matryo.index.column import Column
from matryo.index.scans import flat as module
from matryo.index.scans.common import Allowed


@settings(max_examples=60)
@given(
    rows=st.integers(1, 300), width=st.sampled_from([8, 64, 96, 200]), n=st.integers(1, 320), seed=st.integers(0, 99),
    share=st.floats(0, 1),
)  # fmt: skip
def test_the_lowest_distances(rows, width, n, seed, share):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(funnel, "SAMPLED", 16)
        patch.setattr(module, "ROWS_AT_A_TIME", 100)
        rng = np.random.default_rng(seed)
        base = rng.standard_normal((rows, width)).astype(np.float32)
        queries = rng.standard_normal((3, width)).astype(np.float32)
        column = Column("binary", width)
        column.extend(Stored(base), rows)
        for mask in (None, rng.random(rows) < share):
            allowed = None if mask is None else Allowed(mask)
            there = np.arange(rows) if mask is None else np.flatnonzero(mask)
            for query, (_, found) in zip(queries, module.scan_column(column, queries, n, rows, allowed), strict=True):
                costs = ((base[there] > 0) != (query > 0)).sum(axis=1)
                assert found.tolist() == np.sort(there[np.argsort(costs, kind="stable")[:n]]).tolist()


@settings(max_examples=100)
@given(
    costs=st.lists(st.integers(0, 40), min_size=1, max_size=200), n=st.integers(1, 30), share=st.floats(0, 1),
    kind=st.sampled_from([np.int16, np.int32, np.float32]), slack=st.sampled_from([0.0, 2.0]),
)  # fmt: skip
def test_the_lowest_costs_by_a_limit_are_those_without(costs, n, share, kind, slack):
    values = np.array(costs, kind)
    values[np.random.default_rng(len(costs)).random(len(costs)) > share] = funnel.barred_cost(values)
    plain = funnel.best(values, n, slack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(funnel, "SAMPLED", 16)
        assert funnel.best(values, n, slack).tolist() == plain.tolist()


@settings(max_examples=100)
@given(
    costs=st.lists(st.integers(0, 40), min_size=1, max_size=200), n=st.integers(1, 30), share=st.floats(0, 1),
    kind=st.sampled_from([np.int32, np.float32]), step=st.integers(1, 70),
)  # fmt: skip
def test_the_lowest_of_pieces_are_those_of_the_whole(costs, n, share, kind, step):
    values = np.array(costs, kind)
    values[np.random.default_rng(len(costs)).random(len(costs)) > share] = funnel.barred_cost(values)
    lowest = funnel.Lowest(n)
    for start in range(0, len(values), step):
        lowest.add(values[start : start + step], start)
    found, positions = lowest.found()
    assert positions.tolist() == funnel.best(values, n).tolist()
    assert found.tolist() == values[positions].tolist()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_costs_that_are_all_equal(kind):
    assert funnel.best(np.zeros(200_000, kind), 10).tolist() == list(range(10))
    assert len(funnel.best(np.zeros(200_000, kind), 10, slack=1)) == 200_000


@given(st.lists(st.booleans(), max_size=50))
def test_sparse_flatnonzero_is_flatnonzero(mask):
    assert funnel.sparse_flatnonzero(np.array(mask, bool)).tolist() == np.flatnonzero(mask).tolist()
