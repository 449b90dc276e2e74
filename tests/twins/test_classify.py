"""Cross-entropy of all widths in one pass against one head after another: same value, same gradients."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import matryo as mt
from matryo.losses import NestedHead, classify, nested_cross_entropy


def slow_twin(features, labels, head, nesting, smoothing):
    total = 0
    for width, weight in nesting:
        prefix = mt.truncate(features, width) if head.normalize else features[:, :width]
        if head.tied:
            logits = F.linear(prefix, head.linears[0].weight[:, :width], head.linears[0].bias)
        else:
            linear = head.linears[head.nesting.widths.index(width)]
            logits = F.linear(prefix, linear.weight, linear.bias)
        total = total + weight * F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return total


def gradients(value, features, head):
    """Of the features and every parameter, None for a parameter the value does not depend on."""
    parts = [features, *head.parameters()]
    return torch.autograd.grad(value, parts, allow_unused=True)


def make(blocks, classes, size, seed, *, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    widths = [sum(blocks[: n + 1]) for n in range(len(blocks))]
    head = NestedHead(mt.Nesting(widths), classes, **options).to(dtype)
    features = 3 * torch.randn(size, widths[-1], generator=generator, dtype=torch.float64)
    return features.to(dtype).requires_grad_(), torch.randint(classes, (size,), generator=generator), head


@settings(max_examples=150, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    classes=st.integers(1, 9),
    size=st.integers(1, 13),
    seed=st.integers(0, 2**31),
    kept=st.integers(0, 31),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    tied=st.booleans(),
    normalize=st.booleans(),
    chunk=st.sampled_from([1, 40, 200, classify.CHUNK_SCORES]),
    scratch=st.sampled_from([2, classify.FROM_SCRATCH]),
)
def test_exact_in_float64(blocks, classes, size, seed, kept, smoothing, tied, normalize, chunk, scratch):
    features, labels, head = make(blocks, classes, size, seed, tied=tied, normalize=normalize)
    widths = head.nesting.widths
    some = [w for n, w in enumerate(widths) if kept >> n & 1 or w == widths[-1]]
    nesting = mt.Nesting(some, [0.5 + n for n in range(len(some))])
    with mock.patch.multiple(classify, CHUNK_SCORES=chunk, FROM_SCRATCH=scratch):
        fast = nested_cross_entropy(features, labels, head, nesting=nesting, label_smoothing=smoothing)
    slow = slow_twin(features, labels, head, nesting, smoothing)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    for got, want in zip(gradients(fast, features, head), gradients(slow, features, head), strict=True):
        assert got is not None
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_float32_stays_close_however_large_the_logits(scale):
    features, labels, head = make([8, 8, 16, 32], 50, 37, seed=1, tied=True)
    large = (features.detach() * scale).requires_grad_()
    slow = slow_twin(large, labels, head, head.nesting, 0.0)
    want = gradients(slow, large, head)
    small, head = large.detach().float().requires_grad_(), head.float()
    fast = nested_cross_entropy(small, labels, head, nesting=head.nesting)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-4, atol=0)
    for got, exact in zip(gradients(fast, small, head), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_check_by_finite_differences(tied):
    features, labels, head = make([2, 3], 3, 4, seed=0, tied=tied)
    loss = Loss(head, labels)
    names = [name for name, _ in loss.named_parameters()]

    def call(features, *parameters):
        return torch.func.functional_call(loss, dict(zip(names, parameters, strict=True)), features)

    assert torch.autograd.gradcheck(call, (features, *head.parameters()))


class Loss(torch.nn.Module):
    def __init__(self, head, labels):
        super().__init__()
        self.head, self.labels = head, labels

    def forward(self, features):
        return nested_cross_entropy(features, self.labels, self.head, nesting=self.head.nesting)


def test_backward_twice_and_from_a_scaled_loss():
    features, labels, head = make([4, 4], 5, 6, seed=2, tied=True)
    loss = nested_cross_entropy(features, labels, head, nesting=head.nesting)
    first = torch.autograd.grad(loss, [features, *head.parameters()], retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, [features, *head.parameters()])
    for one, three in zip(first, tripled, strict=True):
        torch.testing.assert_close(3 * one, three, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("frozen", ["features", "head"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    features, labels, head = make([4, 20], 5, 6, seed=2, tied=True)
    want = gradients(slow_twin(features, labels, head, head.nesting, 0.1), features, head)
    if frozen == "features":
        features.requires_grad_(False)
    else:
        head.requires_grad_(False)
    nested_cross_entropy(features, labels, head, nesting=head.nesting, label_smoothing=0.1).backward()
    for tensor, exact in zip([features, *head.parameters()], want, strict=True):
        assert (tensor.grad is None) != tensor.requires_grad
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_and_autocast(tied):
    features, labels, head = make([8, 24], 6, 9, seed=3, dtype=torch.bfloat16, tied=tied)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nested_cross_entropy(features, labels, head, nesting=head.nesting)
        logits = head(features)
    loss.backward()
    assert loss.dtype == logits.dtype == torch.float32
    assert features.grad.dtype == head.linears[0].weight.grad.dtype == torch.bfloat16
    wide, exact = features.detach().double(), head.double()
    torch.testing.assert_close(loss.double(), slow_twin(wide, labels, exact, head.nesting, 0.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_no_logits_are_kept_for_the_backward_pass(tied):
    features, labels, head = make([4, 4, 8], 500, 64, seed=4, tied=tied)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        nested_cross_entropy(features, labels, head, nesting=head.nesting)
    assert kept
    assert max(kept) < 64 * 500
