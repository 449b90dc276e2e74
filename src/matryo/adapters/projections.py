"""The two projections every nested model has to beat: PCA and Gaussian random projection.

Both are fitted once at full width and then cut like a nested model: the first d columns of their output are the
projection to d dimensions. So one fit gives every width, and a comparison at d compares d numbers with d numbers.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import decomposition, random_projection
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from matryo.core.errors import InputError
from matryo.core.prefix import check_width, truncate
from matryo.core.records import check_vectors

Float32s = NDArray[np.float32]


class PCA(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Principal components in order of variance, unit rows out: (N, D) -> (N, width).

    Components are orthonormal and ordered, so the first d columns, renormalised, are the PCA projection to d. They are
    the directions of largest variance about the mean of the fitted vectors, but by default the mean is not taken off
    the vectors that are projected: inner products are what is compared, and so all of them survive at full width.

    Args:
        width: columns kept; None keeps min(D, vectors fitted), the most there can be.
        centred: whether `transform` takes off the mean of the fitted vectors. Textbook PCA does; it retrieves worse,
            because queries do not have the documents' mean.
    """

    def __init__(self, width: int | None = None, centred: bool = False) -> None:
        self.width = width
        self.centred = centred

    def fit(self, vectors: Float32s, y: object = None) -> "PCA":
        """Learn from (N, D) finite vectors, N >= 2. Returns self."""
        checked = check_vectors(vectors)
        if len(checked) < 2:
            raise InputError(f"PCA needs at least 2 vectors to fit, got {len(checked)}")
        self.n_features_in_ = checked.shape[1]
        most = min(checked.shape)
        width = most if self.width is None else check_width(self.width, most)
        # The eigenvectors of the D x D covariance are the same components at a cost that does not grow with N * N.
        solver = "covariance_eigh" if len(checked) >= checked.shape[1] else "full"
        self.pca_ = decomposition.PCA(n_components=width, svd_solver=solver).fit(checked)
        return self

    def transform(self, vectors: Float32s) -> Float32s:
        """(N, D) -> (N, width) float32, unit rows; cut the result with `truncate` for a smaller width."""
        check_is_fitted(self, "pca_")
        checked = check_vectors(vectors, width=self.n_features_in_)
        projected = self.pca_.transform(checked) if self.centred else checked @ self.pca_.components_.T
        return truncate(projected.astype(np.float32, copy=False), self.pca_.n_components_)


class RandomProjection(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A Gaussian random projection, unit rows out: (N, D) -> (N, width).

    One matrix of independent entries is drawn; its first d columns are a Gaussian projection to d of the same law as
    one drawn for d alone, so the projections to different widths are prefixes of one.

    Args:
        width: columns drawn; None means D.
        seed: of the draw.
    """

    def __init__(self, width: int | None = None, seed: int = 0) -> None:
        self.width = width
        self.seed = seed

    def fit(self, vectors: Float32s, y: object = None) -> "RandomProjection":
        """Draw the matrix for vectors of D dimensions; the values are not looked at. Returns self."""
        checked = check_vectors(vectors)
        self.n_features_in_ = checked.shape[1]
        width = self.n_features_in_ if self.width is None else check_width(self.width, self.n_features_in_)
        # The law depends on D alone, so one row of the right shape is all that scikit-learn has to see.
        self.projection_ = random_projection.GaussianRandomProjection(n_components=width, random_state=self.seed)
        self.projection_.fit(np.zeros((1, self.n_features_in_), np.float32))
        return self

    def transform(self, vectors: Float32s) -> Float32s:
        """(N, D) -> (N, width) float32, unit rows; cut the result with `truncate` for a smaller width."""
        check_is_fitted(self, "projection_")
        checked = check_vectors(vectors, width=self.n_features_in_)
        projected: NDArray[Any] = self.projection_.transform(checked)
        return truncate(projected.astype(np.float32, copy=False), projected.shape[1])
