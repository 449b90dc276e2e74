"""Products of the incremental Gram: both libraries against plain products in float64, and which of them is taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import matryo as mt
from matryo.losses import nested_info_nce, products
from matryo.losses.products import OneDnnProducts, TorchProducts, block_products, one_dnn

HAS_ONE_DNN = one_dnn(torch.zeros(1, 1))
KINDS = [TorchProducts, *([OneDnnProducts] if HAS_ONE_DNN else [])]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    count=st.integers(1, 60),
    steps=st.lists(st.integers(1, 90) | st.sampled_from([97, 192, 193, 400]), min_size=1, max_size=4),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_products_are_those_of_the_formula(kind, size, count, steps, chunk, seed):
    ends = torch.tensor(steps).cumsum(0).tolist()
    blocks = [slice(end - step, end) for end, step in zip(ends, steps, strict=True)]
    make = torch.Generator().manual_seed(seed)
    anchors, candidates = (torch.randn(n, ends[-1], generator=make) for n in (size, count))
    suffixes = torch.randn(len(blocks), size, count, generator=make)
    tried = kind(anchors, candidates, blocks)
    for start in range(0, size, chunk):
        rows = slice(start, min(start + chunk, size))
        room = torch.full((rows.stop - start, count), torch.nan)
        for block, gram in zip(blocks, tried.grams(rows, room), strict=True):
            wanted = anchors[rows, : block.stop].double() @ candidates[:, : block.stop].double().T
            torch.testing.assert_close(gram.double(), wanted, rtol=1e-5, atol=1e-4)
        for level in reversed(range(len(blocks))):
            tried.add_gradients(level, rows, suffixes[level, rows])
    grad_anchors, grad_candidates = tried.gradients()
    assert grad_anchors.is_contiguous()
    assert grad_candidates.is_contiguous()
    for block, suffix in zip(blocks, suffixes.double(), strict=True):
        wanted = suffix @ candidates[:, block].double()
        torch.testing.assert_close(grad_anchors[:, block].double(), wanted, rtol=1e-5, atol=1e-4)
        wanted = suffix.T @ anchors[:, block].double()
        torch.testing.assert_close(grad_candidates[:, block].double(), wanted, rtol=1e-5, atol=1e-4)


def test_one_dnn_is_for_float32_where_it_is_switched_on(monkeypatch):
    x = torch.zeros(2, 3)
    assert not one_dnn(x.double())
    assert isinstance(block_products(x.double(), x.double(), [slice(0, 3)]), TorchProducts)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not one_dnn(x)


def test_other_processors_take_what_torch_takes(monkeypatch):
    monkeypatch.setattr(products.platform, "machine", lambda: "aarch64")
    x = torch.zeros(2, 3)
    assert isinstance(block_products(x, x, [slice(0, 3)]), TorchProducts)


@pytest.mark.skipif(not HAS_ONE_DNN, reason="no oneDNN here")
def test_the_loss_is_the_same_by_both(monkeypatch):
    make = torch.Generator().manual_seed(0)
    nesting = mt.Nesting((3, 8, 100))
    found = []
    for enabled in (True, False):
        make.manual_seed(0)
        anchors, candidates = (torch.randn(n, 100, generator=make).requires_grad_() for n in (50, 70))
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        loss = nested_info_nce(anchors, candidates, nesting=nesting, symmetric=True, chunk=16)
        loss.backward()
        found.append((loss, anchors.grad, candidates.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
