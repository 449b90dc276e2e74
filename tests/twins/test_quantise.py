"""InfoNCE over widths x codes against one plain loss for each width and code: same value, same gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import matryo as mt
from matryo.core.codecs import codec
from matryo.losses import nested_quantised_info_nce


def through(y, coded, inside):
    """The straight-through estimator as it is mostly written; values go wrong by a rounding."""
    kept = torch.where(inside, y, y.detach())
    return kept + (coded - kept).detach()


def signs(x, clip):
    y = mt.truncate(x, x.shape[1])
    root = x.shape[1] ** 0.5
    return through(y, torch.where(y > 0, 1.0, -1.0).to(y) / root, y.abs() * root <= (clip or torch.inf))


def int8(x, documents, width):
    y, reach = mt.truncate(x, width), mt.truncate(documents.detach(), width).abs().amax(0)
    step = reach.clamp(min=1e-6) / 127
    return through(y, (y / step).round().clamp(-127, 127) * step, y.abs() <= 127 * step)


def slow_twin(anchors, candidates, nesting, codes, temperatures, asymmetric, clip, symmetric):
    total, own = 0.0, torch.arange(len(anchors))
    for code, code_weight in codes.items():
        for (width, weight), temperature in zip(nesting, temperatures[code], strict=True):
            if code == "binary":
                a, c = mt.truncate(signs(anchors, clip), width), mt.truncate(signs(candidates, clip), width)
            elif code == "int8":
                a, c = int8(anchors, candidates, width), int8(candidates, candidates, width)
            else:
                a, c = anchors, candidates
            a = anchors if code in asymmetric else a
            logits = mt.truncate(a, width) @ mt.truncate(c, width).T / temperature
            loss = F.cross_entropy(logits, own)
            if symmetric:
                loss = (loss + F.cross_entropy(logits[:, own].T, own)) / 2
            total = total + code_weight * weight * loss
    return total


@given(
    size=st.integers(2, 13),
    extra=st.integers(0, 5),
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    codes=st.dictionaries(st.sampled_from(["float32", "int8", "binary"]), st.floats(0.1, 3), min_size=1),
    asymmetric=st.sets(st.sampled_from(["int8", "binary"])),
    clip=st.sampled_from([None, 1.0, 1.5]),
    symmetric=st.booleans(),
)
def test_exact_in_float64(size, extra, blocks, seed, codes, asymmetric, clip, symmetric):
    make = torch.Generator().manual_seed(seed)
    widths = [8 * sum(blocks[: n + 1]) for n in range(len(blocks))]
    nesting = mt.Nesting(widths, [0.5 + n for n in range(len(widths))])
    tensors = [torch.randn(n, nesting.D, generator=make, dtype=torch.float64) * 2 for n in (size, size + extra)]
    temperatures = {code: 0.05 + 0.3 * torch.rand(len(widths), generator=make, dtype=torch.float64) for code in codes}
    options = {"asymmetric": asymmetric, "clip": clip, "symmetric": symmetric}
    results = []
    for fast in (True, False):
        a, c, *t = (x.clone().requires_grad_() for x in (*tensors, *temperatures.values()))
        named = dict(zip(codes, t, strict=True))
        if fast:
            value = nested_quantised_info_nce(a, c, nesting=nesting, codes=codes, temperature=named, chunk=4, **options)
        else:
            value = slow_twin(a, c, nesting, codes, named, **options)
        value.backward()
        results.append([value.detach(), a.grad, c.grad, *(x.grad for x in t)])
    for fast_part, slow_part in zip(*results, strict=True):
        torch.testing.assert_close(fast_part, slow_part, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("code", ["float32", "int8", "binary"])
def test_the_loss_of_a_width_is_that_of_what_search_stores(code):
    make = torch.Generator().manual_seed(5)
    a, c = (torch.randn(n, 32, generator=make) for n in (20, 26))
    nesting = mt.Nesting([8, 16, 32])
    _, values = nested_quantised_info_nce(a, c, nesting=nesting, codes={code: 2.0}, temperature=0.1, per_width=True)
    for level, width in enumerate(nesting.widths):
        queries, documents = mt.truncate(a.numpy(), width), mt.truncate(c.numpy(), width)
        fitted = codec(code, width).fit(documents)
        documents = fitted.decode(fitted.encode(documents))
        if code == "binary":
            queries = fitted.decode(fitted.encode(queries))
        logits = torch.from_numpy(queries @ mt.truncate(documents, width).T / np.float32(0.1))
        torch.testing.assert_close(values[code][level], F.cross_entropy(logits, torch.arange(20)), rtol=1e-5, atol=1e-6)
