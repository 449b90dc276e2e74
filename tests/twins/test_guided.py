"""Guided nested InfoNCE against the formula, mask and loss of each width by themselves: same value, same gradient."""

import pytest
import torch
from torch.nn import functional as F

import matryo as mt
from matryo.losses import nested_guided_info_nce


def slow_twin(anchors, candidates, guide_anchors, guide_candidates, nesting, guide_widths, temperatures, options):
    total = 0.0
    own = torch.arange(len(anchors))
    for (width, weight), guide_width, temperature in zip(nesting, guide_widths, temperatures, strict=True):
        guide = mt.truncate(guide_anchors, guide_width) @ mt.truncate(guide_candidates, guide_width).T
        positive = guide[own, own][:, None]
        mask = guide > positive - options["margin"] * (positive.abs() if options["relative"] else 1)
        mask |= options["ignore"]
        mask[own, own] = False
        logits = mt.truncate(anchors, width) @ mt.truncate(candidates, width).T / temperature
        logits = logits.masked_fill(mask, -torch.inf)
        loss = F.cross_entropy(logits, own)
        if options["symmetric"]:
            loss = (loss + F.cross_entropy(logits[:, own].T, own)) / 2
        total = total + weight * loss
    return total


@pytest.mark.parametrize("nested_guide", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("margin", "relative"), [(0.0, False), (0.1, False), (0.2, True)])
def test_exact_in_float64(nested_guide, symmetric, margin, relative):
    make = torch.Generator().manual_seed(4)
    nesting = mt.Nesting([3, 8, 20], [0.5, 1.0, 2.0])
    guide_nesting = mt.Nesting([2, 5, 9]) if nested_guide else None
    temperatures = torch.tensor([0.2, 0.1, 0.05], dtype=torch.float64)
    tensors = [torch.randn(n, d, generator=make, dtype=torch.float64) for d in (20, 9) for n in (13, 17)]
    ignore = torch.rand(13, 17, generator=make) < 0.1
    options = {"margin": margin, "relative": relative, "symmetric": symmetric, "ignore": ignore}
    results = []
    for fast in (True, False):
        a, c, t = (x.clone().requires_grad_() for x in (*tensors[:2], temperatures))
        if fast:
            value = nested_guided_info_nce(
                a, c, *tensors[2:], nesting=nesting, guide_nesting=guide_nesting, temperature=t, chunk=5, **options
            )
        else:
            widths = guide_nesting.widths if guide_nesting else (9, 9, 9)
            value = slow_twin(a, c, *tensors[2:], nesting, widths, t, options)
        value.backward()
        results.append((value.detach(), a.grad, c.grad, t.grad))
    for fast_part, slow_part in zip(*results, strict=True):
        torch.testing.assert_close(fast_part, slow_part, rtol=1e-10, atol=1e-12)


def test_the_mask_of_a_width_is_that_of_the_guides_prefix():
    make = torch.Generator().manual_seed(1)
    a, c, guide_a, guide_c = (torch.randn(8, d, generator=make) for d in (6, 6, 4, 4))
    nesting = mt.Nesting([2, 6])
    _, nested = nested_guided_info_nce(
        a, c, guide_a, guide_c, nesting=nesting, guide_nesting=mt.Nesting([1, 4]), per_width=True
    )
    _, full = nested_guided_info_nce(a, c, guide_a, guide_c, nesting=nesting, per_width=True)
    assert nested[0] != full[0]
    torch.testing.assert_close(nested[1], full[1])
