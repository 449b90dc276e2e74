"""Losses on labelled rows against loops that read like the papers: same value, same gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import matryo as mt
from matryo.losses import global_orthogonal, nested, nested_multi_similarity, nested_supcon


def slow_multi_similarity(x, labels, alpha, beta, base, epsilon):
    """arXiv 1904.06627, equations 11, 12 and 15, pair by pair."""
    total, rows = x.new_zeros(()), range(len(x))
    for i in rows:
        same = [x[i] @ x[k] for k in rows if k != i and labels[k] == labels[i]]
        other = [x[i] @ x[k] for k in rows if labels[k] != labels[i]]
        lowest = min((s.item() for s in same), default=math.inf)
        highest = max((s.item() for s in other), default=-math.inf)
        kept = [s for s in same if s < highest + epsilon], [s for s in other if s > lowest - epsilon]
        total = (
            total + torch.log(1 + sum(torch.exp(-alpha * (s - base)) for s in kept[0])) / alpha if kept[0] else total
        )
        total = total + torch.log(1 + sum(torch.exp(beta * (s - base)) for s in kept[1])) / beta if kept[1] else total
    return total / len(x)


def slow_supcon(x, labels, temperature):
    """arXiv 2004.11362, equation 2, anchor by anchor."""
    losses, rows = [], range(len(x))
    for i in rows:
        positives = [p for p in rows if p != i and labels[p] == labels[i]]
        if positives:
            below = sum(torch.exp(x[i] @ x[a] / temperature) for a in rows if a != i)
            losses.append(
                -sum(torch.log(torch.exp(x[i] @ x[p] / temperature) / below) for p in positives) / len(positives)
            )
    return sum(losses) / len(losses)


def slow_global_orthogonal(x, y):
    """arXiv 1708.06320, section 3.3, pair by pair."""
    cosines = torch.stack([x[i] @ y[j] for i in range(len(x)) for j in range(len(y)) if i != j])
    return cosines.mean() ** 2 + torch.clamp((cosines**2).mean() - 1 / x.shape[1], min=0)


def labelled(size, widths, classes, seed):
    make = torch.Generator().manual_seed(seed)
    # The first three rows give two classes, one of them twice.
    labels = torch.cat([torch.tensor([0, 1, 0]), torch.randint(classes, (size - 3,), generator=make)])
    means = torch.randn(classes, widths[-1], generator=make, dtype=torch.float64)
    x = means[labels] + torch.randn(size, widths[-1], generator=make, dtype=torch.float64)
    return x.requires_grad_(), labels


def agree(fast, slow, x):
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    (got,), (want,) = torch.autograd.grad(fast, x), torch.autograd.grad(slow, x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


BATCHES = {
    "size": st.integers(3, 9),
    "blocks": st.lists(st.integers(2, 6), min_size=1, max_size=3),
    "classes": st.integers(2, 4),
    "seed": st.integers(0, 2**31),
}


def weighted(blocks):
    widths = [sum(blocks[: n + 1]) for n in range(len(blocks))]
    return mt.Nesting(widths, [0.5 + n for n in range(len(widths))])


@settings(max_examples=40, deadline=None)
@given(**BATCHES, epsilon=st.sampled_from([-0.3, 0.0, 0.1, 2.0]))
def test_multi_similarity(size, blocks, classes, seed, epsilon):
    nesting = weighted(blocks)
    x, labels = labelled(size, nesting.widths, classes, seed)
    fast = nested_multi_similarity(x, labels, nesting=nesting, alpha=3, beta=20, base=0.4, epsilon=epsilon)
    slow = sum(c * slow_multi_similarity(mt.truncate(x, d), labels, 3, 20, 0.4, epsilon) for d, c in nesting)
    agree(fast, slow + 0 * x.sum(), x)


@settings(max_examples=40, deadline=None)
@given(**BATCHES, temperature=st.sampled_from([0.05, 0.1, 1.0]))
def test_supcon(size, blocks, classes, seed, temperature):
    nesting = weighted(blocks)
    x, labels = labelled(size, nesting.widths, classes, seed)
    fast = nested_supcon(x, labels, nesting=nesting, temperature=temperature)
    agree(fast, sum(c * slow_supcon(mt.truncate(x, d), labels, temperature) for d, c in nesting), x)


@settings(max_examples=40, deadline=None)
@given(**BATCHES)
def test_global_orthogonal(size, blocks, classes, seed):
    nesting = weighted(blocks)
    x, _ = labelled(size, nesting.widths, classes, seed)
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    slow = sum(c * slow_global_orthogonal(mt.truncate(x, d), mt.truncate(y, d)) for d, c in nesting)
    agree(nested(global_orthogonal, nesting)(x, y), slow, x)


@pytest.mark.parametrize("loss", [nested_multi_similarity, nested_supcon])
def test_float32_and_half_precision_stay_close(loss):
    nesting = mt.Nesting([8, 16, 64])
    x, labels = labelled(40, nesting.widths, 6, 3)
    exact, widths = loss(x, labels, nesting=nesting, per_width=True)
    torch.testing.assert_close(widths.sum(), exact.detach())
    single = loss(x.float(), labels, nesting=nesting)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)
    half = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, labels, nesting=nesting)
    value.backward()
    assert (value.dtype, half.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(value.double(), loss(half.double(), labels, nesting=nesting), rtol=1e-5, atol=0)
