import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryo.core.errors import InputError, MatryoError
from matryo.core.prefix import Nesting, inverse_norms, truncate


def vectors(seed: int, rows: int = 7, full: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, full)).astype(np.float32)


@given(st.integers(0, 1000), st.integers(1, 24), st.integers(1, 24))
def test_cut_twice_is_cut_once(seed, a, b):
    wide, narrow = max(a, b), min(a, b)
    x = vectors(seed)
    np.testing.assert_allclose(truncate(truncate(x, wide), narrow), truncate(x, narrow), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_width_has_unit_rows(dtype):
    x = vectors(0).astype(dtype)
    for width in range(1, 25):
        cut = truncate(x, width)
        assert cut.shape == (7, width)
        assert cut.dtype == dtype
        np.testing.assert_allclose(
            np.linalg.norm(cut.astype(np.float64), axis=1), 1, atol=2e-3 if dtype == np.float16 else 1e-5
        )


def test_zero_rows_stay_zero_and_extremes_do_not_overflow():
    x = np.zeros((3, 4), np.float32)
    x[1, 3] = 1
    x[2] = 1e25
    cut = truncate(x, 2)
    assert not cut[:2].any()
    np.testing.assert_allclose(cut[2], np.sqrt(0.5), rtol=1e-6)
    assert inverse_norms(x)[0] == 0


@pytest.mark.parametrize("width", [0, -1, 25, True, 3.0, "8", None])
def test_width_outside_is_refused_and_named(width):
    with pytest.raises(InputError, match="24") as caught:
        truncate(vectors(0), width)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MatryoError)


def test_integers_are_no_vectors():
    with pytest.raises(InputError, match="floating point"):
        truncate(np.ones((2, 4), np.int64), 2)


def test_nesting():
    nesting = Nesting.doubling(8, 50)
    assert nesting.widths == (8, 16, 32, 50)
    assert nesting.D == 50
    assert len(nesting) == 4
    assert next(iter(nesting)) == (8, 1.0)
    assert [(b.start, b.stop) for b in nesting.blocks] == [(0, 8), (8, 16), (16, 32), (32, 50)]
    nesting.check(50)
    with pytest.raises(InputError, match=r"\[8, 16, 32, 50, 64\]|64"):
        nesting.check(64)


@pytest.mark.parametrize(
    ("widths", "weights", "said"),
    [
        ([], None, "at least one"),
        ([8, 8], None, "rise strictly"),
        ([16, 8], None, r"try \[8, 16\]"),
        ([0, 8], None, "integers >= 1"),
        ([True, 8], None, "integers >= 1"),
        ([8.0], None, "integers >= 1"),
        ([8], [1, 2], "need 1 weights"),
        ([8], [float("nan")], "finite"),
        ([8], [-1], ">= 0"),
        ([8, 16], [0, 0], "every weight is 0"),
    ],
)
def test_bad_nesting_says_how_to_fix_it(widths, weights, said):
    with pytest.raises(InputError, match=said):
        Nesting(widths, weights)


def test_bad_doubling():
    with pytest.raises(InputError, match="first=64"):
        Nesting.doubling(64, 8)
