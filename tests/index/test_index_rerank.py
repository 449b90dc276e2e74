"""Exact scores of a shortlist against a slow twin, for both ways rows may lie on the disk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_contract import names, rows, unit

from matryo.index import Index
from matryo.index.rerank import inner_products
from matryo.index.vectors import STORES, Vectors, floats


def stored(folder, base: np.ndarray, store: str) -> Vectors:
    with Index.create(folder, width=base.shape[1], store=store) as index:
        index.upsert(names(len(base)), base)
        return index.snapshot().vectors


@pytest.fixture(scope="module", params=list(STORES))
def vectors(request, tmp_path_factory):
    return stored(tmp_path_factory.mktemp("v") / "i", rows(400, width=97), request.param)


def test_scores_are_inner_products_with_the_stored_rows(vectors):
    query = unit(rows(1, seed=1, width=97))[0].astype(np.float32)
    chosen = np.array([0, 3, 4, 77, 399])
    twin = vectors.stored[chosen].astype(np.float64) @ query.astype(np.float64)
    np.testing.assert_allclose(inner_products(vectors, query, chosen), twin, atol=1e-6)
    assert inner_products(vectors, query, chosen[:0]).shape == (0,)


def test_a_rows_score_does_not_depend_on_its_company(vectors):
    query = unit(rows(1, seed=1, width=97))[0].astype(np.float32)
    everything = np.arange(400)
    whole = inner_products(vectors, query, everything)
    for n in (1, 2, 3, 5, 64, 90):
        parts = [inner_products(vectors, query, everything[at : at + n]) for at in range(0, 400, n)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(inner_products(vectors, query, everything[5::7]), whole[5::7])


@given(
    values=st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=40).filter(lambda v: max(map(abs, v)) > 1e-3),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_float16_costs_a_score_less_than_5e_4(values, seed):
    """Numbers far below 2^-14 are subnormal or zero in float16: what is lost there is below 2^-25 each."""
    row = unit(np.array([values], np.float32))[0]
    query = unit(rows(1, seed=seed, width=len(row)))[0]
    kept = row.astype(np.float32).astype(np.float16)
    assert abs(query @ kept.astype(np.float64) - query @ row) < 5e-4
    assert kept.any()
    np.testing.assert_array_equal(floats(kept[None])[0], kept.astype(np.float32))


def test_the_widest_and_flattest_row_and_tiny_numbers_stay(tmp_path):
    flat = np.ones((1, 65536), np.float32)
    peak = np.zeros((1, 65536), np.float32)
    peak[0, 7], peak[0, 9] = 1, 1e-7
    with Index.create(tmp_path / "i", width=65536, plan="65536:float32") as index:
        index.upsert(["flat", "peak"], np.concatenate([flat, peak]))
        assert index.search(flat, k=1).ids == [["flat"]]
        assert index.search(flat, k=1).scores[0][0] == pytest.approx(1, abs=5e-4)
        assert index.search(peak, k=1).scores[0][0] == pytest.approx(1, abs=5e-4)
        assert 0 < index.snapshot().vectors.stored[1, 9] < 2e-7


def test_converting_by_blocks_is_converting(vectors):
    np.testing.assert_array_equal(floats(vectors.stored), vectors.stored.astype(np.float32))
    np.testing.assert_array_equal(vectors.chunk(7, 391), vectors.take(np.arange(7, 391)))


def test_both_stores_find_the_same_and_float16_takes_half(tmp_path):
    found = {}
    for store in STORES:
        with Index.create(tmp_path / store, width=64, store=store) as index:
            index.upsert(names(500), rows(500))
            found[store] = index.search(rows(20, seed=2), k=10, plan="64:float32")
            assert index.stats()["vector_bytes"] == 500 * 64 * (2 if store == "float16" else 4)
    np.testing.assert_allclose(found["float16"].scores, found["float32"].scores, atol=5e-4)
    same = sum(len(set(a) & set(b)) for a, b in zip(found["float16"].ids, found["float32"].ids, strict=True))
    assert same >= 198


@pytest.mark.parametrize("store", list(STORES))
def test_a_stage_that_the_store_holds_keeps_no_codes(tmp_path, store):
    with Index.create(tmp_path / "i", width=64, plan=f"32:binary keep 30 > 64:{store} keep 20", store=store) as index:
        index.upsert(names(100), rows(100))
        got = index.search(rows(3, seed=1), k=5, plan=f"32:binary keep 100 > 32:{store} keep 100 > 64:{store}")
        assert got == index.search(rows(3, seed=1), k=5, plan="64:float32")
        assert list(index.stats()["codes"]) == ["32:binary"]
    assert [p.name for p in (tmp_path / "i" / "codes").iterdir()] == ["1-32-binary.safetensors"]
