import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import matryo as mt
from matryo.core.errors import InputError, MissingExtraError
from matryo.core.prefix import truncate


def vectors(rows: int = 60, full: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    return truncate((rng.standard_normal((rows, full)) * np.arange(1, full + 1) + 0.5).astype(np.float32), full)


@pytest.mark.parametrize(
    "estimator", [mt.adapters.PCA(), mt.adapters.PCA(centred=True), mt.adapters.RandomProjection()]
)
def test_unit_float32_rows_and_scikit_learn_manners(estimator):
    x = vectors()
    copy = clone(estimator)
    with pytest.raises(NotFittedError):
        copy.transform(x)
    out = copy.fit(x).transform(x)
    assert out.shape == (60, 12)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(clone(estimator).fit_transform(x), out)
    with pytest.raises(InputError, match="expected width 12, got 5"):
        copy.transform(x[:, :5])
    for width in (13, 0, True):
        with pytest.raises(InputError, match="width"):
            clone(estimator).set_params(width=width).fit(x)


def test_pca_without_a_shift_loses_nothing_at_full_width():
    x = vectors()
    out = mt.adapters.PCA().fit(x).transform(x)
    np.testing.assert_allclose(out @ out.T, x @ x.T, atol=1e-5)
    assert (np.diff(out.var(axis=0)) <= 1e-6).all()


@pytest.mark.parametrize("centred", [True, False])
def test_one_fit_gives_every_width(centred):
    x = vectors()
    whole = mt.adapters.PCA(centred=centred).fit(x)
    small = mt.adapters.PCA(width=4, centred=centred).fit(x)
    products = truncate(whole.transform(x), 4) @ truncate(whole.transform(x), 4).T
    np.testing.assert_allclose(small.transform(x) @ small.transform(x).T, products, atol=1e-4)


def test_pca_of_few_vectors_has_few_components():
    x = vectors(5)
    assert mt.adapters.PCA().fit(x).transform(x).shape == (5, 5)
    with pytest.raises(InputError, match="at least 2 vectors"):
        mt.adapters.PCA().fit(x[:1])


def test_random_projection_keeps_inner_products_on_average():
    x = vectors(4, 24)
    seen = [mt.adapters.RandomProjection(seed=s).fit(x).projection_.components_ for s in range(300)]
    mean = np.mean([x @ c.T @ c @ x.T for c in seen], axis=0)
    np.testing.assert_allclose(mean, x @ x.T, atol=0.08)


def test_names_and_missing_packages(monkeypatch):
    assert {"PCA", "RandomProjection"} <= set(dir(mt.adapters))
    with pytest.raises(AttributeError, match="no attribute 'UMAP'"):
        mt.adapters.UMAP  # noqa: B018
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "matryo.adapters.projections", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'matryo\[eval\]'"):
        mt.adapters.PCA  # noqa: B018
