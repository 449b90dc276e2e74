"""The n lowest costs, by a limit from the leading ones, are those of all sorted, lower rows first among equals."""

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
        patch.setattr(funnel, "LEADING", 16)
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
        patch.setattr(funnel, "LEADING", 24)
        assert funnel.best(values, n, slack).tolist() == plain.tolist()
