import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryo.core.codecs import CODECS, codec
from matryo.core.errors import InputError
from matryo.core.prefix import truncate


def prefixes(seed: int, width: int, rows: int = 40) -> np.ndarray:
    return truncate(np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32), width)


def bound(name: str, x: np.ndarray, fitted) -> np.ndarray | float:
    """How far decode(encode(x)) may lie from x."""
    if name == "int8":
        return fitted.scale / 2 * (1 + 1e-5) + 1e-9
    if name == "int4":  # half a step inside, the distance to the outermost level where it was clipped
        outside = np.maximum(np.abs(x) - 8 * fitted.step, 0)
        return (fitted.step / 2 + outside) * (1 + 1e-5) + 1e-7
    # Relative errors of the formats; float16 has subnormals below 6e-5, spaced 6e-8.
    return {"float32": 0.0, "float16": np.abs(x) * 2**-11 + 3e-8, "bfloat16": np.abs(x) * 2**-8}[name]


@given(st.sampled_from(["float32", "float16", "bfloat16", "int8", "int4"]), st.integers(1, 70), st.integers(0, 1000))
def test_decode_of_encode_is_within_the_bound(name, width, seed):
    x = prefixes(seed, width)
    fitted = codec(name, width).fit(x)
    codes = fitted.encode(x)
    assert codes.nbytes == fitted.bytes_per_item * len(x)
    assert (np.abs(fitted.decode(codes) - x) <= bound(name, x, fitted)).all()


@given(st.integers(1, 16), st.integers(0, 1000))
def test_binary_keeps_signs_and_counts_hamming(eighth, seed):
    width = 8 * eighth
    x = prefixes(seed, width)
    fitted = codec("binary", width).fit(x)
    codes = fitted.encode(x)
    assert codes.nbytes == fitted.bytes_per_item * len(x)
    decoded = fitted.decode(codes)
    np.testing.assert_array_equal(decoded > 0, x > 0)
    hamming = np.unpackbits(codes[:1] ^ codes, axis=1).sum(axis=1)
    np.testing.assert_allclose(decoded @ decoded[0], 1 - 2 * hamming / width, atol=1e-5)


@given(st.sampled_from(sorted(CODECS)), st.integers(0, 1000))
def test_encoding_what_was_decoded_changes_nothing(name, seed):
    x = prefixes(seed, 16)
    fitted = codec(name, 16).fit(x)
    codes = fitted.encode(x)
    np.testing.assert_array_equal(fitted.encode(fitted.decode(codes)), codes)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_state_is_taken_over(name):
    x = prefixes(3, 16)
    fitted = codec(name, 16).fit(x)
    again = codec(name, 16).load(fitted.state)
    np.testing.assert_array_equal(again.encode(x), fitted.encode(x))
    assert repr(again).endswith("(16)")


def test_values_outside_the_fitted_range_are_clipped():
    fitted = codec("int8", 2).fit(np.array([[0.5, 0.5]], np.float32))
    np.testing.assert_allclose(fitted.decode(fitted.encode(np.array([[9, -9]], np.float32))), [[0.5, -0.5]], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_bad_vectors_are_refused(name):
    x = prefixes(0, 16)
    fitted = codec(name, 16).fit(x)
    with pytest.raises(InputError, match=r"width 16, got vectors of shape \(40, 8\)"):
        fitted.encode(x[:, :8])
    x[3, 2] = np.nan
    with pytest.raises(InputError, match="row 3 holds NaN"):
        fitted.encode(x)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_int4_packs_two_dimensions_a_byte(width, seed):
    x = prefixes(seed, width)
    fitted = codec("int4", width).fit(x)
    codes = fitted.encode(x)
    assert codes.shape == (len(x), (width + 1) // 2)
    levels = np.rint(fitted.decode(codes) / fitted.step + 7.5)
    np.testing.assert_array_equal(levels[:, ::2], codes & 15)
    np.testing.assert_array_equal(levels[:, 1::2], (codes >> 4)[:, : width // 2])


@given(st.integers(0, 1000))
def test_int4_step_follows_the_spread_but_never_exceeds_the_reach(seed):
    x = prefixes(seed, 24, rows=200)
    step = codec("int4", 24).fit(x).step
    assert (step <= np.abs(x).max(axis=0) / 8 + 1e-6).all()
    np.testing.assert_allclose(codec("int4", 24).fit(x * np.float32(0.5)).step, step / 2, rtol=1e-5, atol=2e-6)


def test_bad_codecs_are_refused():
    with pytest.raises(InputError, match="float32, float16"):
        codec("int3", 8)
    with pytest.raises(InputError, match=r"multiple of 8, got 20; try 16"):
        codec("binary", 20)
    with pytest.raises(InputError, match=r"call fit"):
        codec("int8", 8).encode(prefixes(0, 8))
    with pytest.raises(InputError, match="at least one vector"):
        codec("int8", 8).fit(np.empty((0, 8), np.float32))
    for name, said in (("int4", "no steps yet; call fit"), ("int4", "at least one vector")):
        with pytest.raises(InputError, match=said):
            codec(name, 8).encode(prefixes(0, 8)) if "steps" in said else codec(name, 8).fit(np.empty((0, 8), "f4"))
    with pytest.raises(InputError, match="int4 at width 8 needs 'step': 8 positive numbers"):
        codec("int4", 8).load({"step": np.full(7, 1.0)})
    with pytest.raises(InputError, match="8 positive numbers"):
        codec("int8", 8).load({"scale": np.zeros(8)})
    with pytest.raises(InputError, match="has no state"):
        codec("float16", 8).load({"scale": np.ones(8)})
