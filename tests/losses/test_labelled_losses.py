"""What the losses on labelled rows and the regulariser refuse, and laws they keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import matryo as mt
from matryo.losses import global_orthogonal, nested, nested_info_nce, nested_multi_similarity, nested_supcon

NESTING = mt.Nesting([4, 8])
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 0, 2, 1])
BOTH = pytest.mark.parametrize("loss", [nested_multi_similarity, nested_supcon])


@BOTH
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_row_order_label_names_and_lengths_do_not_matter(loss, seed):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 8, generator=make, dtype=torch.float64)
    labels = torch.tensor([3, 3, -1, 7, -1, 7, 7])
    order = torch.randperm(7, generator=make)
    renamed = torch.tensor([{3: 10, -1: 0, 7: 3}[int(label)] for label in labels])
    scale = torch.rand(7, 1, generator=make, dtype=torch.float64) + 0.1
    other = loss((x * scale)[order], renamed[order], nesting=NESTING)
    torch.testing.assert_close(loss(x, labels, nesting=NESTING), other, rtol=1e-12, atol=1e-12)


@BOTH
def test_identical_and_zero_rows_stay_finite(loss):
    for x in (X[:1].repeat(5, 1), torch.zeros(5, 8), torch.cat([X[:4], X[:1]])):
        x = x.clone().requires_grad_()
        value = loss(x, Y, nesting=NESTING)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(x.grad).all()


def test_well_separated_classes_cost_little():
    """Positives at cosine 1 and negatives at -1: only the soft edges remain, nothing is mined."""
    x = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert nested_multi_similarity(x, labels, nesting=mt.Nesting([2])) == 0
    assert nested_supcon(x, labels, nesting=mt.Nesting([2])) < 1e-6


def test_pairs_are_mined_at_each_width():
    """Classes apart in column 0 alone: width 1 mines nothing, width 2 does, though the labels are the same."""
    x = torch.tensor([[0.1, 1.0], [0.1, -1], [-0.1, 1], [-0.1, -1]])
    labels = torch.tensor([0, 0, 1, 1])
    values = nested_multi_similarity(x, labels, nesting=mt.Nesting([1, 2]), per_width=True)[1]
    assert values[0] == 0
    assert values[1] > 0.4


def test_supcon_of_two_views_is_info_nce_among_all_rows():
    """With each label twice it is SimCLR's loss: InfoNCE over the other 2N - 1 rows."""
    make = torch.Generator().manual_seed(1)
    x = torch.randn(8, 8, generator=make, dtype=torch.float64)
    labels, targets = torch.arange(8) % 4, (torch.arange(8) + 4) % 8
    simclr = nested_info_nce(
        x, x, nesting=NESTING, temperature=0.2, targets=targets, ignore=torch.eye(8, dtype=torch.bool)
    )
    torch.testing.assert_close(nested_supcon(x, labels, nesting=NESTING, temperature=0.2), simclr)


def test_global_orthogonal_is_that_of_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss

    theirs = GlobalOrthogonalRegularizationLoss(torch.nn.Identity())
    for x in (X.double(), X.double() + 1):
        mean, second = theirs.compute_gor(x)
        ours = global_orthogonal(mt.truncate(x, 8), mt.truncate(x, 8))
        torch.testing.assert_close(ours["mean"], mean)
        torch.testing.assert_close(ours["second_moment"], second)
        total, values = nested(global_orthogonal, NESTING)(x, x, per_width=True)
        torch.testing.assert_close(values[1], mean + second)
        torch.testing.assert_close(total, values.sum())


def test_terms_of_a_loss_add_up():
    a = X.double().requires_grad_()
    terms = {"pull": lambda x: (x[0] - x[1]).square().sum(), "spread": lambda x: (x @ x.T).square().mean()}
    nesting = mt.Nesting([4, 8], [1.0, 3.0])
    single = [nested(term, nesting)(a, per_width=True) for term in terms.values()]
    forms = {
        "mapping": lambda x: {name: term(x) for name, term in terms.items()},
        "tuple": lambda x: tuple(term(x) for term in terms.values()),
        "list": lambda x: [term(x) for term in terms.values()],
    }
    want = torch.autograd.grad(single[0][0] + single[1][0], a)[0]
    for form in forms.values():
        total, values = nested(form, nesting)(a, per_width=True)
        torch.testing.assert_close(total, single[0][0] + single[1][0])
        torch.testing.assert_close(values, single[0][1] + single[1][1])
        torch.testing.assert_close(torch.autograd.grad(total, a)[0], want)


def test_regulariser_beside_a_main_loss():
    def both(anchors, positives):
        main = F.cross_entropy(anchors @ positives.T / 0.05, torch.arange(len(anchors)))
        return {"info_nce": main, **global_orthogonal(anchors, positives)}

    a, p = X.double(), X.double().flip(0)
    parts = nested_info_nce(a, p, nesting=NESTING) + nested(global_orthogonal, NESTING)(a, p)
    torch.testing.assert_close(nested(both, NESTING)(a, p), parts)


def with_nan(row, column):
    x = X.clone()
    x[row, column] = torch.nan
    return x


@BOTH
@pytest.mark.parametrize(
    ("x", "labels", "says"),
    [
        (X, Y.float(), "labels must be integers, got torch.float32"),
        (X, Y[:3], r"labels must be \(5,\), one for each row, got \(3,\)"),
        (
            X,
            torch.arange(5),
            "all 5 labels of the batch differ, so no row has a positive; sample batches with at least",
        ),
        (X[:1], Y[:1], "a batch of one row has no pairs; use batches of at least two rows"),
        (X[:0], Y[:0], "at least one row, got none"),
        (X[:, :4], Y, "ends at width 8 but the vectors have 4"),
        (X.long(), Y, r"embeddings must be a \(B, 8\) floating tensor"),
        (with_nan(2, 1), Y, "the loss at width 4 is nan: row 2 of embeddings holds NaN or Inf"),
        (with_nan(3, 6), Y, "the loss at width 8 is nan: row 3 of embeddings holds NaN or Inf"),
        (with_nan(3, 6) * torch.inf, Y, "row 0 of embeddings holds NaN or Inf"),
    ],
)
def test_bad_rows_and_labels_are_named(loss, x, labels, says):
    with pytest.raises(ValueError, match=says):
        loss(x, labels, nesting=NESTING)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: nested_multi_similarity(X, torch.full((5,), 3), nesting=NESTING),
            "all 5 rows have label 3, so there are no negatives; sample batches with at least two classes",
        ),
        (lambda: nested_multi_similarity(X, Y, nesting=NESTING, alpha=0), "alpha must be finite and above 0, got 0"),
        (lambda: nested_multi_similarity(X, Y, nesting=NESTING, beta=-1), "beta must be finite and above 0, got -1"),
        (lambda: nested_multi_similarity(X, Y, nesting=NESTING, base=float("nan")), "base must be finite, got nan"),
        (lambda: nested_supcon(X, Y, nesting=NESTING, temperature=0), "temperature must be finite and above 0, got 0"),
        (lambda: global_orthogonal(X, X[:3]), r"got \(5, 8\) and \(3, 8\)"),
        (lambda: global_orthogonal(X[:1], X[:1]), "needs at least two rows, got 1"),
        (
            lambda: nested(lambda x: x.sum(1), NESTING)(X),
            r"must return a scalar.* got shapes \[\(5,\)\]; take its mean",
        ),
        (lambda: nested(lambda x: {}, NESTING)(X), r"must return a scalar.* got shapes \[\]"),
        (lambda: nested(lambda anchors: anchors.sum(), NESTING)(with_nan(2, 5)), "width 8 is nan: row 2 of anchors"),
        (lambda: nested(lambda *rows: rows[0].sum(), NESTING)(X, with_nan(2, 5)), None),
        (lambda: nested(lambda *rows: rows[1].sum(), NESTING)(X, with_nan(2, 5)), "row 2 of argument 2 holds"),
        (lambda: nested(lambda x: x.sum() / 0, NESTING)(X), "width 4 is -?inf though every input is finite"),
    ],
)
def test_bad_options_and_losses_are_named(call, says):
    if says is None:
        assert torch.isfinite(call())
        return
    with pytest.raises(ValueError, match=says):
        call()
