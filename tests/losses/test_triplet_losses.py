"""Triplet and online contrastive: margins that can be met, mining per width, sentence-transformers at full width."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    OnlineContrastiveLoss,
    SiameseDistanceMetric,
    TripletDistanceMetric,
    TripletLoss,
)
from torch.nn.functional import normalize

import matryo as mt
from matryo.losses import nested_online_contrastive, nested_triplet

METRICS = ["cosine", "euclidean"]
ONE = mt.Nesting([2, 4])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(11)


@pytest.fixture
def rows():
    return torch.randn(3, 40, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("metric", METRICS)
def test_triplet_full_width_is_sentence_transformers(metric, rows):
    peer = TripletLoss(None, getattr(TripletDistanceMetric, metric.upper()), triplet_margin=0.4)
    want = peer.compute_loss_from_embeddings([normalize(x) for x in rows], None)
    got = nested_triplet(*rows, nesting=mt.Nesting([12]), margin=0.4, metric=metric)
    # torch's pairwise distance adds 1e-6 to every difference.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_contrastive_full_width_is_sentence_transformers(metric, share, rows):
    labels = (torch.arange(40) < 40 * share).long()
    peers = {"cosine": SiameseDistanceMetric.COSINE_DISTANCE, "euclidean": SiameseDistanceMetric.EUCLIDEAN}
    peer = OnlineContrastiveLoss(None, peers[metric], margin=1.5)
    want = peer.compute_loss_from_embeddings([normalize(x) for x in rows[:2]], labels)
    got = nested_online_contrastive(*rows[:2], labels, nesting=mt.Nesting([12]), margin=1.5, metric=metric)
    assert want > 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_hard_pairs_are_mined_again_at_every_width():
    first = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    # At width 2 the positive is far and the negative close; at width 4 the other way round.
    second = torch.tensor([[0.1, 1.0, 0, 0], [1.0, 0, 9.0, 0]])
    second[0, 0] = 1.0
    labels = torch.tensor([1, 0])
    _, values = nested_online_contrastive(first, second, labels, nesting=ONE, margin=1.0, per_width=True)
    root = 0.5**0.5
    torch.testing.assert_close(values, torch.tensor([(1 - root) ** 2 + 1.0, 0.0]))


@pytest.mark.parametrize("metric", METRICS)
def test_a_margin_is_met_exactly_up_to_the_diameter(metric):
    a = torch.tensor([[1.0, 2, 3, 4]])
    assert float(nested_triplet(a, a, -a, nesting=ONE, margin=2.0, metric=metric)) <= 1e-6
    assert float(nested_triplet(a, a, a, nesting=ONE, metric=metric)) > 0.2


@pytest.mark.parametrize("metric", METRICS)
def test_identical_and_zero_rows_have_finite_gradients(metric):
    a = torch.ones(4, 4)
    a[1] = 0
    a.requires_grad_()
    value = nested_triplet(a, torch.ones(4, 4), torch.ones(4, 4), nesting=ONE, metric=metric)
    value = value + nested_online_contrastive(a, torch.ones(4, 4), torch.arange(4) % 2, nesting=ONE, metric=metric)
    value.backward()
    assert a.grad.isfinite().all()


def test_half_precision_and_autocast(rows):
    a, p, n = rows.bfloat16()
    a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = nested_triplet(a, p, n, nesting=mt.Nesting([3, 12]), metric="euclidean")
    value.backward()
    assert value.dtype == torch.float32
    assert a.grad.dtype == torch.bfloat16
    exact = nested_triplet(a.double(), p.double(), n.double(), nesting=mt.Nesting([3, 12]), metric="euclidean")
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


X = torch.randn(3, 4)
YES = torch.tensor([1, 0, 1])
BAD = X.clone()
BAD[2, 3] = torch.nan


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: nested_triplet(X, X, X, nesting=ONE, margin=5.0, metric="euclidean"),
            r"at most 2, got 5\.0: euclidean distances of unit vectors lie in 0\.\.2, so the loss could never reach",
        ),
        (lambda: nested_triplet(X, X, X, nesting=ONE, margin=2.01), "cosine distances .* try 0.2"),
        (lambda: nested_triplet(X, X, X, nesting=ONE, margin=0.0), "margin must be above 0"),
        (lambda: nested_triplet(X, X, X, nesting=ONE, margin=float("nan")), "got nan"),
        (lambda: nested_triplet(X, X, X, nesting=ONE, metric="manhattan"), "'cosine' or 'euclidean', got 'manhattan'"),
        (lambda: nested_triplet(X, X, X[:2], nesting=ONE), "negatives has 2 rows and anchors 3"),
        (lambda: nested_triplet(X, BAD, X, nesting=ONE), "width 4 is nan: row 2 of positives holds NaN"),
        (
            lambda: nested_online_contrastive(X, X, YES, nesting=ONE, margin=3.0),
            "could never reach zero",
        ),
        (lambda: nested_online_contrastive(X, X, YES, nesting=ONE, metric="dot"), "got 'dot'"),
        (lambda: nested_online_contrastive(X, X, YES[:2], nesting=ONE), r"labels must be \(3,\), got \(2,\)"),
        (
            lambda: nested_online_contrastive(X, X, torch.tensor([0, 1, 2]), nesting=ONE),
            "labels must be 0 or 1, got 2 in row 2",
        ),
        (lambda: nested_online_contrastive(X[:1], X[:1], YES[:1], nesting=ONE), "batch of one has no hard pairs"),
        (lambda: nested_online_contrastive(X, BAD, YES, nesting=ONE), "width 4 is nan: row 2 of second"),
        (lambda: nested_online_contrastive(X, BAD, 1 - YES, nesting=ONE), "width 4 is nan: row 2 of second"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
