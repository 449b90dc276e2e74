"""Turning a model to other axes before it is trained nested."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

import matryo as mt
from matryo.core.errors import InputError
from matryo.training import train
from matryo.training.rotation import Learning, add_rotation, learned_axes, neighbourhoods, principal_axes

SHORT = Learning(steps=20, batch_size=32, warmup=5)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


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
    add_rotation(model, [texts])
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
    add_rotation(model, [texts])
    assert len(model) == 1
    np.testing.assert_allclose(cosines(model.encode(texts), 32), cosines(before, 32), atol=1e-5)


def lack(vectors, axes, widths):
    """Mean divergence of the prefixes' softmax from the whole vectors', over all rows, in float64: the slow twin."""

    def told(x):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        scores = x @ x.T / 0.05
        np.fill_diagonal(scores, -np.inf)
        shares = np.exp(scores - scores.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    vectors = vectors.astype(np.float64)
    aim, off = told(vectors), ~np.eye(len(vectors), dtype=bool)
    return sum((aim[off] * np.log(aim[off] / told(vectors @ axes[:w].T)[off])).sum() / len(vectors) for w in widths)


def test_learned_axes_are_orthonormal_and_say_more_than_others(rng):
    """What matters lies in a corner that neither the first dimensions nor those of largest variance know of."""
    kinds = np.repeat(np.eye(32)[28:], 64, axis=0) * 3
    told = np.zeros((256, 32))
    told[:, 10:18] = rng.normal(size=(256, 8))
    vectors = (kinds + told + 0.1 * rng.normal(size=(256, 32))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    axes = learned_axes([vectors], mt.Nesting([4, 8, 32]), how=Learning(steps=150, batch_size=128, warmup=5))
    np.testing.assert_allclose(axes @ axes.T, np.eye(32), atol=1e-5)
    mine, others = (
        lack(vectors, axes, [4, 8]),
        [lack(vectors, a, [4, 8]) for a in (np.eye(32), principal_axes(vectors))],
    )
    assert mine < 0.9 * min(others)


def test_first_step_goes_down_the_slope_of_the_loss(rng):
    """Where everything is one batch, steps of Adam on the twin's finite differences turn the same way."""
    vectors = rng.normal(size=(24, 6)).astype(np.float32)
    axes = learned_axes(
        [vectors], mt.Nesting([2, 6]), how=Learning(steps=1, batch_size=24, learning_rate=1e-3, warmup=1)
    )
    turned = (axes - axes.T)[np.triu_indices(6, 1)]
    slopes = []
    for i, j in zip(*np.triu_indices(6, 1), strict=True):
        skew = np.zeros((6, 6))
        skew[i, j], skew[j, i] = 1e-4, -1e-4
        ends = [np.linalg.solve(np.eye(6) + s * skew, np.eye(6) - s * skew) for s in (1, -1)]
        slopes.append((lack(vectors, ends[0], [2]) - lack(vectors, ends[1], [2])) / 2e-4)
    steep = np.abs(slopes) > 1e-3
    # The map is I - 2A to first order, and Adam's first step is against the sign of each slope.
    assert steep.sum() >= 8
    assert np.array_equal(np.sign(turned)[steep], np.sign(slopes)[steep])


def test_axes_are_learned_from_partners_and_the_same_twice(rng):
    columns = [rng.normal(size=(80, 12)).astype(np.float32) for _ in range(2)]
    nesting = mt.Nesting([3, 12])
    one, two, other = (learned_axes(columns, nesting, how=SHORT, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert np.array_equal(learned_axes(columns, mt.Nesting([12]), how=SHORT), np.eye(12, dtype=np.float32))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 100), st.integers(1, 20))
def test_neighbourhoods_share_out_all_rows_evenly(seed, rows, fewest):
    vectors = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    parts = neighbourhoods(vectors, fewest)
    assert sorted(np.concatenate(parts)) == list(range(rows))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(rows, fewest)
    assert len(parts) == 1 or max(sizes) <= 2 * fewest + 1


def test_neighbourhoods_tell_kinds_apart(rng):
    kinds = rng.permutation(np.repeat([0, 1], 40))
    vectors = (rng.normal(size=(80, 5)) + 20 * kinds[:, None]).astype(np.float32)
    assert all(len(set(kinds[part])) == 1 for part in neighbourhoods(vectors, 40))


def test_transformer_learns_axes_and_keeps_its_cosines(minilm, texts):
    model = SentenceTransformer(str(minilm), device="cpu")
    before = model.encode(texts)
    add_rotation(model, [texts[:48], texts[48:]], "learned", mt.Nesting([12, 384]), bfloat16=True)
    after = model.encode(texts)
    np.testing.assert_allclose(cosines(after, 384), cosines(before, 384), atol=1e-5)
    assert lack(after, np.eye(384), [12]) < 0.8 * lack(before, np.eye(384), [12])


@pytest.mark.parametrize("options", [{"rotate": "pca"}, {"rotate": "learned"}, {"rotate": "pca", "blend": 0.5}])
def test_run_that_goes_on_gives_the_same_bits(interrupted, config, trained, options):
    options = {"base": str(trained), "learning_rate": 0.01, **options}
    first = interrupted(**options)
    train(first, resume=True)
    whole = config("whole", **options)
    train(whole)
    one, two = ((made.out / "model.safetensors").read_bytes() for made in (first, whole))
    assert one == two
    assert one != (trained / "model.safetensors").read_bytes()


def test_there_must_be_a_model_to_turn(config):
    with pytest.raises(InputError, match="rotate turns the vectors of a model that exists; name one as base"):
        config(rotate="learned")


def test_axes_by_name(config, trained):
    assert [config(base=str(trained), rotate=given).rotate for given in (True, False)] == ["pca", "none"]
    with pytest.raises(InputError, match=r"rotate: Input should be 'none', 'pca' or 'learned', got 'random'"):
        config(base=str(trained), rotate="random")


def test_no_epoch_only_turns_the_base(config, trained, texts):
    with pytest.raises(InputError, match="0 epochs train nothing; that is for turning a base: give rotate"):
        config(base=str(trained), epochs=0)
    model = train(config(base=str(trained), epochs=0, rotate="learned", widths=[4, 32]))
    before, after = mt.load(trained).encode(texts), model.encode(texts)
    np.testing.assert_allclose(cosines(after, 32), cosines(before, 32), atol=1e-5)
    assert lack(after, np.eye(32), [4]) < lack(before, np.eye(32), [4])
    assert model.card.training["steps"] == 0


def test_learning_needs_widths(trained):
    model = SentenceTransformer(str(trained), device="cpu")
    with pytest.raises(InputError, match="axes are learned for widths"):
        add_rotation(model, [["a text", "another"]], "learned")
