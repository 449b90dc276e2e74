"""Linear heads on prefixes.

Letters: N items, C classes, D full width, L widths, d a width.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.gram import check_widths
from matryo.core.labelled import check_labels
from matryo.core.prefix import inverse_norms, truncate
from matryo.core.records import check_vectors

Float32s = NDArray[np.float32]
TOLERANCE = 1e-6
"""Of the largest partial derivative. Stopping earlier costs wide prefixes more than narrow ones."""
STRENGTH = 10.0
"""Inverse weight of the squared length of the head (scikit-learn's C) on prefixes of unit length."""
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Tried where it is chosen."""
HELD_OUT = 5
"""One in so many rows judges a strength."""
SEED = 0


log = logging.getLogger("matryo.classify")


@dataclass(frozen=True)
class LinearHeads:
    """One linear classifier per width: logits_d = W_d x[:d] + b_d (arXiv 2205.13147, section 3).

    With `normalize` each prefix is scaled to unit length first, as an index holds it.
    """

    widths: tuple[int, ...]
    classes: tuple[str, ...]
    weights: tuple[Float32s, ...]
    """(C, d) for each width."""
    biases: tuple[Float32s, ...]
    """(C,) for each width."""
    normalize: bool = True

    def __post_init__(self) -> None:
        check_widths(self.widths, max(self.widths, default=1))
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise InputError(f"heads need at least two classes of different names, got {len(self.classes)}")
        if not len(self.weights) == len(self.biases) == len(self.widths):
            raise InputError(f"{len(self.widths)} widths but {len(self.weights)} weights and {len(self.biases)} biases")
        count = len(self.classes)
        for width, weight, bias in zip(self.widths, self.weights, self.biases, strict=True):
            if weight.shape != (count, width) or bias.shape != (count,):
                raise InputError(f"width {width}: expected a weight {(count, width)}, got {weight.shape}")
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise InputError(f"width {width}: the head holds NaN or Inf; train it again")

    @property
    def full(self) -> int:
        """The widest width."""
        return self.widths[-1]

    @classmethod
    def of(cls, head: Any, classes: Sequence[str]) -> "LinearHeads":
        """The trained MRL or MRL-E heads that `matryo.training.load_head` gives, with their classes."""
        parts = [head.parameters_at(width) for width in head.nesting.widths]
        weights, biases = (
            [np.array(t.detach().cpu().float().numpy()) for t in side] for side in zip(*parts, strict=True)
        )
        return cls(tuple(head.nesting.widths), tuple(classes), tuple(weights), tuple(biases), head.normalize)

    def logits(self, vectors_ND: Float32s, level: int) -> Float32s:
        """(N, C) logits of the head at `widths[level]`."""
        width = self.widths[level]
        prefix = truncate(vectors_ND, width) if self.normalize else vectors_ND[:, :width]
        found: Float32s = prefix @ self.weights[level].T + self.biases[level]
        return found

    @cached_property
    def tied(self) -> bool:
        """Whether all heads are prefixes of the widest (MRL-E): a wider one then goes on from a narrower one's sums."""
        weight, bias = self.weights[-1], self.biases[-1]
        return all(np.array_equal(one, weight[:, : one.shape[1]]) for one in self.weights) and all(
            np.array_equal(one, bias) for one in self.biases
        )

    def logits_after(self, vectors_ND: Float32s, level: int, sums_NC: Float32s, read: int) -> Float32s:
        """As `logits` of tied heads, reading only the dimensions after the first `read`, whose products with the
        weight `sums_NC` holds; those of this level's dimensions are added to it."""
        width = self.widths[level]
        sums_NC += vectors_ND[:, read:width] @ self.weights[-1][:, read:width].T
        scale = inverse_norms(vectors_ND[:, :width])[:, None].astype(np.float32) if self.normalize else 1
        found: Float32s = sums_NC * scale + self.biases[-1]
        return found


def fit_heads(
    vectors_ND: Float32s,
    labels: Sequence[Any],
    widths: Sequence[int],
    strength: float | None = STRENGTH,
    iterations: int = 1000,
) -> LinearHeads:
    """Multinomial logistic regression on each renormalised prefix, by L-BFGS (scikit-learn).

    Args:
        vectors_ND: (N, D) training vectors.
        labels: N classes, text or whole numbers; at least two different ones.
        widths: rising, inside 1..D.
        strength: inverse weight of the penalty on the head's squared length. With None each width has the one of
            STRENGTHS whose head on four fifths of the rows gives the rest the least log loss: where dimensions say much
            the same, a wide head does with less than a narrow one. It takes several times as long.
        iterations: at most so many steps a width. A head that has not converged by then is kept, with a warning in the
            log: it is a classifier, but no longer the one that another run or library would give.

    Raises:
        InputError: what does not fit, in one line.
        MissingExtraError: without scikit-learn.
    """
    vectors, names = check_vectors(np.asarray(vectors_ND)), check_labels(labels)
    if len(vectors) != len(names):
        raise InputError(f"{len(vectors)} vectors but {len(names)} labels; give one for each")
    chosen = check_widths(widths, vectors.shape[1])
    classes, targets = np.unique(names, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"all labels are {names[0]!r}; a classifier needs at least two classes")
    check_strength(strength)
    fitted = []
    for width in chosen:
        prefix = truncate(vectors, width)
        held = _best_strength(prefix, targets, iterations) if strength is None else strength
        fitted.append(_logistic(prefix, targets, held, iterations))
    weights, biases = zip(*fitted, strict=True)
    return LinearHeads(tuple(chosen), tuple(str(c) for c in classes), weights, biases)


def check_strength(strength: float | None) -> None:
    """Raise InputError unless `fit_heads` takes it."""
    if strength is not None and not strength > 0:
        raise InputError(f"strength must be above 0, got {strength}")


def _best_strength(prefix_Nd: Float32s, targets_N: NDArray[np.int64], iterations: int) -> float:
    """The first of STRENGTHS after which the log loss of held-out rows rises."""
    order = np.random.default_rng(SEED).permutation(len(targets_N))
    rest, part = np.split(order, [len(order) // HELD_OUT])
    known, places = np.unique(targets_N[part], return_inverse=True)
    rest = rest[np.isin(targets_N[rest], known)]
    if len(known) < 2 or not len(rest):
        return STRENGTH
    right = np.searchsorted(known, targets_N[rest])
    best, least = STRENGTH, np.inf
    for strength in STRENGTHS:
        weight, bias = _logistic(prefix_Nd[part], places, strength, iterations)
        logits = (prefix_Nd[rest] @ weight.T + bias).astype(np.float64)
        loss = float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(rest)), right]).mean())
        if loss >= least:
            break
        best, least = strength, loss
    log.info("width %d: strength %g, log loss %.4f of held-out rows", prefix_Nd.shape[1], best, least)
    return best


def _logistic(
    prefix_Nd: Float32s, targets_N: NDArray[np.int64], strength: float, iterations: int
) -> tuple[Float32s, Float32s]:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "eval", "fitting linear heads") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=iterations, tol=TOLERANCE).fit(prefix_Nd, targets_N)
    if model.n_iter_.max() >= iterations:
        log.warning("the head of width %d has not converged in %d steps", prefix_Nd.shape[1], iterations)
    weight, bias = model.coef_.astype(np.float32), model.intercept_.astype(np.float32)
    if len(weight) == 1:  # two classes: scikit-learn keeps the second's logit less the first's
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return weight, bias
