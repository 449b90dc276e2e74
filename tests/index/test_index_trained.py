"""Codes that faiss trains obey the laws of codecs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryo.core.codecs import CODECS
from matryo.core.errors import InputError
from matryo.core.prefix import truncate
from matryo.index.funnel import product_problem
from matryo.index.trained import index_codec

NAMES = ["pq4", "pq1", "pq8", "rabitq"]


def prefixes(seed: int, width: int = 16, rows: int = 60) -> np.ndarray:
    return truncate(np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32), width)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 500), st.integers(1, 60))
def test_sizes_states_and_repetition(name, seed, count):
    x = prefixes(seed, rows=count)
    fitted = index_codec(name, 16).fit(x)
    codes = fitted.encode(x)
    assert codes.shape == (count, fitted.bytes_per_item)
    assert fitted.decode(codes).shape == x.shape
    assert np.isfinite(fitted.decode(codes)).all()
    again = index_codec(name, 16).load(fitted.state)
    np.testing.assert_array_equal(again.encode(x), codes)
    np.testing.assert_array_equal(index_codec(name, 16).fit(x).encode(x), codes)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["pq1", "pq2", "pq4"]), st.integers(0, 500))
def test_product_codes_are_the_nearest_centroids(name, seed):
    x = prefixes(seed)
    fitted = index_codec(name, 16).fit(x)
    parts = fitted.centroids.shape[0]
    pieces = x.reshape(len(x), parts, -1)
    distances = ((pieces[:, :, None] - fitted.centroids[None]) ** 2).sum(-1)
    decoded = fitted.decode(fitted.encode(x)).reshape(pieces.shape)
    np.testing.assert_allclose(((decoded - pieces) ** 2).sum(-1), distances.min(-1), atol=1e-5)
    np.testing.assert_array_equal(fitted.encode(fitted.decode(fitted.encode(x))), fitted.encode(x))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500))
def test_more_bytes_lose_less(seed):
    x = prefixes(seed, rows=200)
    lost = []
    for name in ("pq1", "pq2", "pq4", "pq8"):
        fitted = index_codec(name, 16).fit(x)
        lost.append(((fitted.decode(fitted.encode(x)) - x) ** 2).sum())
    assert lost == sorted(lost, reverse=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.sampled_from([8, 16, 20, 33]))
def test_rabitq_keeps_each_rows_product_with_itself(seed, width):
    """About the centre c: <x - c, decoded - c> = |x - c|^2, which makes the estimate of any product unbiased."""
    x = prefixes(seed, width=width)
    fitted = index_codec("rabitq", width).fit(x)
    about = x - fitted.centre
    np.testing.assert_allclose(
        ((fitted.decode(fitted.encode(x)) - fitted.centre) * about).sum(1), (about**2).sum(1), rtol=1e-3
    )


def test_rabitq_of_a_row_at_the_centre_is_finite():
    x = np.repeat(prefixes(1, rows=1), 5, axis=0)
    fitted = index_codec("rabitq", 16).fit(x)
    np.testing.assert_allclose(fitted.decode(fitted.encode(x)), x, atol=1e-3)


@given(st.integers(1, 200), st.integers(1, 100))
def test_a_product_code_that_does_not_divide_names_ones_that_do(width, size):
    problem = product_problem(width, size)
    assert (problem == "") == (width % (2 * size) == 0)
    for word in problem.rsplit("use ", 1)[-1].split(", ") if "pq" in problem.rsplit("use ", 1)[-1] else []:
        assert product_problem(width, int(word[2:])) == ""


@pytest.mark.parametrize("name", ["pq4", "rabitq"])
def test_what_is_wrong_is_said(name):
    fresh, x = index_codec(name, 16), prefixes(0)
    with pytest.raises(InputError, match="call fit"):
        fresh.encode(x)
    with pytest.raises(InputError, match="at least one vector"):
        fresh.fit(x[:0])
    with pytest.raises(InputError, match=r"width 16, got vectors of shape \(60, 8\)"):
        fresh.fit(x[:, :8])
    with pytest.raises(InputError, match="needs '"):
        fresh.load({"scale": np.ones(16)})
    x[3, 2] = np.nan
    with pytest.raises(InputError, match="row 3 holds NaN"):
        fresh.fit(x)


def test_names():
    with pytest.raises(InputError, match=r"unknown code 'int3'; the index stores float32, .* rabitq, pq<bytes>"):
        index_codec("int3", 8)
    with pytest.raises(InputError, match="pq3 cuts a prefix into 6 equal parts, which 8 dimensions do not give"):
        index_codec("pq3", 8)
    for name in CODECS:
        assert index_codec(name, 8).name == name
