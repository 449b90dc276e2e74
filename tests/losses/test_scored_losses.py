"""CoSENT and AnglE: equal to sentence-transformers' at full width, blind to all but the order of the scores."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import AnglELoss, CoSENTLoss

import matryo as mt
from matryo.losses import nested_angle, nested_cosent

BOTH = [(nested_cosent, CoSENTLoss), (nested_angle, AnglELoss)]
ONE = mt.Nesting([2, 4])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(11)


@pytest.fixture
def pairs():
    make = torch.Generator().manual_seed(7)
    first, second = torch.randn(2, 33, 24, generator=make, dtype=torch.float64)
    return first, second, torch.randint(6, (33,), generator=make) / 5


@pytest.mark.parametrize(("loss", "peer"), BOTH)
def test_full_width_is_sentence_transformers(loss, peer, pairs):
    first, second, scores = pairs
    ours, theirs = (x.clone().requires_grad_() for x in (first, first))
    got = loss(ours, second, scores, nesting=mt.Nesting([24]))
    want = peer(None, scale=20.0).compute_loss_from_embeddings([theirs, second], scores)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    got.backward()
    want.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("loss", "_peer"), BOTH)
def test_only_the_order_of_scores_counts(loss, _peer, pairs):
    first, second, scores = pairs
    value = loss(first, second, scores, nesting=mt.Nesting([8, 24]))
    torch.testing.assert_close(loss(first, second, scores.exp() * 40, nesting=mt.Nesting([8, 24])), value)
    mix = torch.randperm(33)
    torch.testing.assert_close(loss(first[mix], second[mix], scores[mix], nesting=mt.Nesting([8, 24])), value)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(loss(first, second, -scores, nesting=mt.Nesting([8, 24])), value)


def test_scores_of_any_type(pairs):
    first, second, _ = pairs
    yes = torch.arange(33) % 2
    values = [
        nested_cosent(first, second, yes.to(kind), nesting=mt.Nesting([24]))
        for kind in (torch.bool, torch.int64, torch.bfloat16, torch.float64)
    ]
    assert all(bool(value == values[0]) for value in values)


def test_large_scales_do_not_overflow(pairs):
    first, second, scores = (x.float() for x in pairs)
    first.requires_grad_()
    value = nested_cosent(first, second, scores, nesting=mt.Nesting([4, 24]), scale=[1e3, 1e4])
    value.backward()
    assert value.isfinite()
    assert first.grad.isfinite().all()


def test_half_precision_and_autocast(pairs):
    first, second, scores = (x.bfloat16() for x in pairs)
    first.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = nested_angle(first, second, scores, nesting=mt.Nesting([4, 24]))
    value.backward()
    assert value.dtype == torch.float32
    assert first.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, nested_angle(first.float(), second.float(), scores, nesting=mt.Nesting([4, 24])))


def test_zero_and_identical_rows_have_finite_gradients():
    first = torch.ones(4, 4)
    first[0] = 0
    first.requires_grad_()
    for loss in (nested_cosent, nested_angle):
        loss(first, torch.ones(4, 4), torch.arange(4), nesting=ONE).backward()
        assert first.grad.isfinite().all()
        assert bool((first.grad[0] == 0).all())


X = torch.randn(3, 4)
SCORES = torch.tensor([0.1, 0.5, 0.9])


def with_nan(x, row, column):
    bad = x.clone()
    bad[row, column] = torch.nan
    return bad


@pytest.mark.parametrize("loss", [nested_cosent, nested_angle])
@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((X, X, torch.ones(3)), {}, "all 3 scores are 1.0, so there is no order to learn"),
        ((X[:1], X[:1], SCORES[:1]), {}, "all 1 scores are .*at least two pairs of different score"),
        ((X, X, SCORES[:2]), {}, r"scores must be \(3,\), got \(2,\)"),
        ((X, X, torch.tensor([0, torch.nan, 1])), {}, r"scores\[1\] is nan; leave that row out"),
        ((X, X[:2], SCORES), {}, "second has 2 rows and first 3"),
        ((X, X[:, :2], SCORES), {}, "ends at width 4 but the vectors have 2"),
        ((X[0], X, SCORES), {}, r"first must be a \(B, 4\) floating tensor, got \(4,\)"),
        ((X.long(), X, SCORES), {}, "floating tensor, got .* of torch.int64"),
        ((X[:0], X[:0], SCORES[:0]), {}, "at least one row"),
        ((X, X, SCORES), {"scale": 0.0}, "scale must be finite and above 0, got 0.0"),
        ((X, X, SCORES), {"scale": [1.0, 2.0, 3.0]}, r"scale must be one number or one per width \(2\)"),
        ((X, with_nan(X, 2, 3), SCORES), {}, "the loss at width 4 is nan: row 2 of second holds NaN or Inf"),
        ((with_nan(X, 1, 0), X, SCORES), {}, "the loss at width 2 is nan: row 1 of first holds NaN or Inf"),
    ],
)
def test_bad_input_is_named(loss, arguments, options, says):
    with pytest.raises(ValueError, match=says):
        loss(*arguments, nesting=ONE, **options)


def test_angle_refuses_odd_widths():
    x = torch.randn(3, 6)
    with pytest.raises(ValueError, match="real and an imaginary half, so widths must be even, got 3; use 4"):
        nested_angle(x, x, SCORES, nesting=mt.Nesting([2, 3, 6]))
