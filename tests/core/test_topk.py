import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryo.core.errors import InputError
from matryo.core.topk import top_k


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 35))
def test_matches_a_full_stable_sort_with_many_ties(seed, n, k):
    scores = np.random.default_rng(seed).integers(0, 4, (5, n)).astype(np.float32)
    positions, values = top_k(scores, k)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=1))


def test_bad_input():
    with pytest.raises(InputError, match=r"\(Q, N\)"):
        top_k(np.ones(3), 1)
    with pytest.raises(InputError, match="at least 1"):
        top_k(np.ones((1, 3)), 0)
    with pytest.raises(InputError, match="row 1 of the scores holds NaN"):
        top_k(np.array([[1.0, 2, 3], [np.nan, np.nan, np.nan]]), 2)


def test_no_rows_and_no_columns():
    assert top_k(np.empty((0, 3)), 2)[0].shape == (0, 2)
    assert top_k(np.empty((2, 0)), 2)[0].shape == (2, 0)
