"""Exact search by bounds against scoring every row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_contract import Stored

from matryo.core.errors import InputError
from matryo.core.prefix import truncate
from matryo.index import Index, codes
from matryo.index.column import Column
from matryo.index.scans.bounds import LENGTHS, Bounds, exact_rows
from matryo.index.scans.common import Allowed


def unit_rows(n: int, seed: int, width: int, decay: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    fall = np.arange(1, width + 1, dtype=np.float32) ** -np.float32(decay)
    centres = rng.standard_normal((12, width), dtype=np.float32)
    rows = (centres[rng.integers(0, 12, n)] + rng.standard_normal((n, width), dtype=np.float32)) * fall
    return truncate(rows, width)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 300), st.sampled_from([32, 48, 100]), st.floats(0, 1.2), st.integers(2, 80))
def test_a_bound_is_never_below_the_score(seed, width, decay, n):
    base, late = unit_rows(n, seed, width, decay), unit_rows(30, seed + 1, width, 0.0)
    queries = unit_rows(5, seed + 2, width, decay)
    made = Bounds(width).fit(base)
    for rows in (base, late):  # late ones are clipped: the error's length says so
        encoded = made.encode(rows)
        assert encoded.shape == (len(rows), made.bytes_per_item)
        bounds = made.queries(queries) @ encoded.T.astype(np.float32)
        assert (bounds >= queries @ rows.T - 1e-5).all()
    slack = np.linalg.norm(base - made.decode(made.encode(base)), axis=1) + 2 / LENGTHS
    assert (made.queries(queries) @ made.encode(base).T - queries @ base.T <= 2 * slack + 1e-5).all()
    again = Bounds(width).load(made.state)
    np.testing.assert_array_equal(again.encode(base), made.encode(base))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 300), st.floats(0, 1.0), st.integers(1, 12), st.integers(0, 900))
def test_no_row_of_the_best_is_left_out(seed, decay, n, barred):
    base, queries = unit_rows(4000, seed, 64, decay), unit_rows(3, seed + 1, 64, decay)
    mask = np.ones(4000, bool)
    mask[np.random.default_rng(seed).permutation(4000)[:barred]] = False
    column = Column("bounds", 64, codec=Bounds(64))
    column.extend(Stored(base), 4000)
    for query in queries:
        scores = base @ query
        found = exact_rows(column, query, n, 4000, Allowed(mask) if barred else None, lambda rows, s=scores: s[rows])
        if found is not None:
            assert mask[found].all()
            assert (np.diff(found) > 0).all()
            best = np.argsort(-np.where(mask, scores, -9), kind="stable")[:n]
            assert set(best.tolist()) <= set(found.tolist())


def test_the_width_follows_the_spectrum():
    assert len(Bounds(256).fit(unit_rows(4000, 0, 256, 0.9)).state["scale"]) == 128
    assert len(Bounds(256).fit(unit_rows(4000, 0, 256, 0.0)).state["scale"]) == 256


@pytest.mark.parametrize("store", ["float16", "float32"])
def test_an_index_searches_by_bounds_as_without(tmp_path, monkeypatch, store):
    base, queries = unit_rows(5000, 1, 64, 0.5), unit_rows(6, 2, 64, 0.5)
    base[4000:4040] = base[7]  # equal rows: the lower ones win
    with Index.create(tmp_path / "i", width=64, plan="64:float32", store=store) as index:
        index.upsert([f"d{i}" for i in range(5000)], base, metadata=[{"m": i % 2} for i in range(5000)])
        index.delete(["d9", "d4001"])
        wanted = [index.search(np.vstack([queries, base[7:8]]), 10, where=where) for where in (None, {"m": 0})]
        assert index.stats()["codes"] == {}
        monkeypatch.setattr(codes, "BOUNDS_FROM", 0)
        for where, before in zip((None, {"m": 0}), wanted, strict=True):
            assert index.search(np.vstack([queries, base[7:8]]), 10, where=where) == before
        assert list(index.stats()["codes"]) == ["64:bounds"]
    with Index.open(tmp_path / "i") as index:
        assert index.search(np.vstack([queries, base[7:8]]), 10) == wanted[0]
        index.upsert(["late"], queries[:1])
        assert index.search(queries[:1], 1).ids == [["late"]]


def test_an_exact_plan_is_prepared_with_its_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "BOUNDS_FROM", 0)
    with Index.create(tmp_path / "i", width=64, plan="64:float32") as index:
        index.prepare()
        assert index.stats()["codes"] == {}  # nothing to derive them from
        index.upsert([f"d{i}" for i in range(2000)], unit_rows(2000, 1, 64, 0.5))
        index.prepare()
        assert list(index.stats()["codes"]) == ["64:bounds"]
    assert [path.name for path in (tmp_path / "i" / "codes").iterdir()] == ["1-64-bounds.safetensors"]


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match="no scale yet"):
        Bounds(32).encode(unit_rows(2, 0, 32, 0))
    with pytest.raises(InputError, match="need 'scale': up to 32 positive numbers"):
        Bounds(32).load({"scale": np.zeros(40)})
