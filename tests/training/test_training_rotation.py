"""Turning a model to its principal axes before it is trained nested."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

import matryo as mt
from matryo.core.errors import InputError
from matryo.training import train
from matryo.training.rotation import add_rotation, principal_axes


@pytest.fixture(scope="module")
def texts(debian_rows) -> list[str]:
    return [row["positive"][:200] for row in debian_rows[:96]]


def cosines(vectors, width):
    cut = mt.truncate(vectors, width)
    return cut @ cut.T


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 12))
def test_axes_are_orthonormal_in_order_of_variance_and_of_one_sign(seed, rows, width):
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    axes = principal_axes(vectors)
    np.testing.assert_allclose(axes @ axes.T, np.eye(width), atol=1e-5)
    spread = (vectors @ axes.T).var(axis=0)
    assert (np.diff(spread) <= 1e-4).all()
    assert (axes[np.arange(width), np.abs(axes).argmax(axis=1)] > 0).all()
    assert np.array_equal(axes, principal_axes(vectors))


def test_transformer_keeps_its_cosines_and_its_prefixes_keep_more(minilm, texts, tmp_path):
    model = SentenceTransformer(str(minilm), device="cpu")
    before = model.encode(texts)
    add_rotation(model, texts)
    after = model.encode(texts)
    whole = cosines(before, 384)
    np.testing.assert_allclose(cosines(after, 384), whole, atol=1e-5)
    for width in (12, 48, 192):
        agreement = [np.corrcoef(cosines(x, width).ravel(), whole.ravel())[0, 1] for x in (before, after)]
        assert 1 - agreement[1] < 0.8 * (1 - agreement[0])
    model.save_pretrained(str(tmp_path))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path), device="cpu").encode(texts), after, atol=1e-6)


def test_static_table_is_turned_itself(trained, texts):
    model = SentenceTransformer(str(trained), device="cpu")
    before = model.encode(texts)
    add_rotation(model, texts)
    assert len(model) == 1
    np.testing.assert_allclose(cosines(model.encode(texts), 32), cosines(before, 32), atol=1e-5)


def test_run_that_goes_on_gives_the_same_bits(interrupted, config, trained):
    options = {"base": str(trained), "rotate": True, "learning_rate": 0.01}
    first = interrupted(**options)
    train(first, resume=True)
    whole = config("whole", **options)
    train(whole)
    one, two = ((made.out / "model.safetensors").read_bytes() for made in (first, whole))
    assert one == two
    assert one != (trained / "model.safetensors").read_bytes()


def test_there_must_be_a_model_to_turn(config):
    with pytest.raises(InputError, match="rotate turns the vectors of a model that exists; name one as base"):
        config(rotate=True)
