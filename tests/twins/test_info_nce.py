"""The one-pass nested InfoNCE against the plain sum over widths: same value, same gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import matryo as mt
from matryo.losses import nested, nested_info_nce


def plain_info_nce(anchors, candidates, *, temperature, targets, symmetric, keep):
    """One width, as the formula reads. `keep` is the (B, N) mask of pairs that count."""
    logits = (anchors @ candidates.T / temperature).masked_fill(~keep, -torch.inf)
    forward = F.cross_entropy(logits, targets)
    if not symmetric:
        return forward
    backward = F.cross_entropy(logits[:, targets].T, torch.arange(len(anchors)))
    return (forward + backward) / 2


def slow_twin(anchors, candidates, nesting, temperature, targets, symmetric, keep):
    temperatures = temperature.expand(len(nesting))
    return sum(
        weight
        * plain_info_nce(
            mt.truncate(anchors, width),
            mt.truncate(candidates, width),
            temperature=temperatures[level],
            targets=targets,
            symmetric=symmetric,
            keep=keep,
        )
        for level, (width, weight) in enumerate(nesting)
    )


def kept(size, count, targets, ignore, group):
    keep = torch.ones(size, count, dtype=torch.bool)
    if ignore is not None:
        keep &= ~ignore
    if group is not None:
        full = torch.cat([group, torch.full((count - len(group),), -1)])
        own = full[targets]
        keep &= ~((own[:, None] == full) & (own[:, None] >= 0))
    keep[torch.arange(size), targets] = True
    return keep


def relative(a, b):
    # A gradient that is next to 0 everywhere is not relative to anything: below 1e-2 the error is held against 1e-2.
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-2))


def compare(size, extra, widths, weights, *, seed, dtype, tolerance, temperature, symmetric, chunk, masks, targeted):
    make = torch.Generator().manual_seed(seed)
    nesting = mt.Nesting(widths, weights)
    count = size + extra
    anchors = torch.randn(size, nesting.D, generator=make, dtype=torch.float64)
    candidates = torch.randn(count, nesting.D, generator=make, dtype=torch.float64) * 3
    candidates[:size] += anchors
    temperature = torch.as_tensor(temperature, dtype=torch.float64)
    targets = torch.randperm(count, generator=make)[:size] if targeted else torch.arange(size)
    ignore = torch.rand(size, count, generator=make) < 0.2 if "ignore" in masks else None
    group = torch.randint(-1, max(2, size // 2), (size,), generator=make) if "group" in masks else None
    results = []
    for fast in (True, False):
        kind = dtype if fast else torch.float64
        a, c, t = (x.clone().to(kind).requires_grad_() for x in (anchors, candidates, temperature))
        if fast:
            value = nested_info_nce(
                a,
                c,
                nesting=nesting,
                temperature=t,
                targets=targets if targeted else None,
                symmetric=symmetric,
                ignore=ignore,
                group=group,
                chunk=chunk,
            )
        else:
            value = slow_twin(a, c, nesting, t, targets, symmetric, kept(size, count, targets, ignore, group))
        value.backward()
        results.append((value.detach().double(), a.grad.double(), c.grad.double(), t.grad.double()))
    for fast_part, slow_part in zip(*results, strict=True):
        assert relative(fast_part, slow_part) <= tolerance


@settings(max_examples=120, deadline=None)
@given(
    size=st.integers(1, 19),
    extra=st.integers(0, 7),
    blocks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    per_width_temperature=st.booleans(),
    # 0.0245 takes the path of large logits. Colder ones have a test of their own: the temperature's gradient cancels
    # terms of size 1 / temperature ** 2, which float64 does not resolve to 1e-12 where the gradient is next to 0.
    base=st.sampled_from([0.0245, 0.05, 0.3]),
    symmetric=st.booleans(),
    chunk=st.sampled_from([1, 4, 7, None]),
    masks=st.sets(st.sampled_from(["ignore", "group"])),
    targeted=st.booleans(),
)
def test_exact_in_float64(size, extra, blocks, seed, per_width_temperature, base, symmetric, chunk, masks, targeted):
    if size + extra < 2:
        extra += 1
    # From width 2 on: at width 1 a cosine is +-1 and its gradient 0, so no error is relative to anything (see below).
    widths = [1 + sum(blocks[: n + 1]) for n in range(len(blocks))]
    compare(
        size,
        extra,
        widths,
        [0.5 + n for n in range(len(widths))],
        seed=seed,
        dtype=torch.float64,
        tolerance=1e-10,
        temperature=[base * (1 + n / 3) for n in range(len(widths))] if per_width_temperature else base,
        symmetric=symmetric,
        chunk=chunk,
        masks=masks,
        targeted=targeted,
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("symmetric", [False, True])
def test_exact_at_a_cold_temperature(seed, symmetric):
    compare(
        48,
        16,
        [2, 5, 12, 32],
        [0.5, 1.5, 2.5, 3.5],
        seed=seed,
        dtype=torch.float64,
        tolerance=1e-10,
        temperature=[0.005, 0.008, 0.011, 0.02],
        symmetric=symmetric,
        chunk=13,
        masks={"ignore", "group"},
        targeted=True,
    )


def test_width_1_has_a_value_and_no_gradient():
    a, c = (torch.randn(9, 1, dtype=torch.float64).requires_grad_() for _ in range(2))
    fast = nested_info_nce(a, c, nesting=mt.Nesting([1]))
    fast.backward()
    torch.testing.assert_close(fast, F.cross_entropy(a.sign() @ c.sign().T / 0.05, torch.arange(9)))
    # What cancels are terms of size 1 / (temperature * length): the rest is rounding of those.
    for x in (a, c):
        torch.testing.assert_close(x.grad * x.abs(), torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_float32_within_1e_4(symmetric, temperature):
    compare(
        193,
        31,
        [8, 16, 32, 64, 128],
        None,
        seed=3,
        dtype=torch.float32,
        tolerance=1e-4,
        temperature=temperature,
        symmetric=symmetric,
        chunk=64,
        masks={"group"},
        targeted=False,
    )


def test_readable_form_is_the_same_loss():
    nesting = mt.Nesting([4, 12, 16], [1.0, 0.0, 2.0])
    a = torch.randn(9, 16, dtype=torch.float64)
    c = torch.randn(9, 16, dtype=torch.float64)

    def info_nce(anchors, candidates, labels):
        return F.cross_entropy(anchors @ candidates.T / 0.05, labels)

    slow, slow_widths = nested(info_nce, nesting)(a, c, torch.arange(9), per_width=True)
    fast, fast_widths = nested_info_nce(a, c, nesting=nesting, per_width=True)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    torch.testing.assert_close(fast_widths, slow_widths, rtol=1e-12, atol=0)


def test_zero_rows_have_cosine_zero_and_finite_gradients():
    nesting = mt.Nesting([2, 4])
    a, c = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    a[1] = 0
    c[2, :2] = 0
    a.requires_grad_()
    c.requires_grad_()
    fast = nested_info_nce(a, c, nesting=nesting)
    fast.backward()
    got = a.grad.clone(), c.grad.clone()
    a.grad = c.grad = None
    slow = slow_twin(a, c, nesting, torch.tensor(0.05), torch.arange(5), False, torch.ones(5, 5, dtype=torch.bool))
    slow.backward()
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(got[0], a.grad)
    torch.testing.assert_close(got[1], c.grad)


def test_autocast_keeps_full_precision():
    nesting = mt.Nesting([8, 64])
    a, c = torch.randn(33, 64), torch.randn(33, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nested_info_nce(a, c, nesting=nesting)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, nested_info_nce(a, c, nesting=nesting), rtol=0, atol=0)


def test_half_precision_input_gets_half_precision_gradients():
    nesting = mt.Nesting([8, 64])
    a = torch.randn(33, 64, dtype=torch.bfloat16, requires_grad=True)
    value = nested_info_nce(a, torch.randn(40, 64, dtype=torch.bfloat16), nesting=nesting)
    value.backward()
    assert value.dtype == torch.float32
    assert a.grad.dtype == torch.bfloat16
    assert torch.isfinite(a.grad).all()


def test_gradient_check_by_finite_differences():
    nesting = mt.Nesting([2, 5], [1.0, 0.7])
    a = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, c, t: nested_info_nce(a, c, nesting=nesting, temperature=t, symmetric=True, chunk=3), (a, c, t)
    )


def test_no_gradient_no_gradient_work():
    a = torch.randn(6, 8)
    with torch.no_grad():
        value = nested_info_nce(a, a, nesting=mt.Nesting([4, 8]))
    assert not value.requires_grad
    assert torch.isfinite(value)


ONE = torch.ones(3, 8)
BAD = ONE.clone()
BAD[1, 5] = torch.nan


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nested_info_nce(ONE, ONE[:, :4], nesting=mt.Nesting([8])), r"\(3, 8\) and \(3, 4\)"),
        (lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([4])), "ends at width 4 but the vectors have 8"),
        (lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([4, 16])), "ends at width 16"),
        (lambda: nested_info_nce(ONE, ONE[:2], nesting=mt.Nesting([8])), "3 anchors need at least 3 candidates"),
        (lambda: nested_info_nce(ONE[:0], ONE, nesting=mt.Nesting([8])), "at least one anchor"),
        (lambda: nested_info_nce(ONE[:1], ONE[:1], nesting=mt.Nesting([8])), "give at least 2 candidates"),
        (lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([8]), temperature=0.0), "above 0, got 0.0"),
        (lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([8]), temperature=[1.0, 2.0]), r"one per width \(1\)"),
        (
            lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([8]), targets=torch.tensor([0, 1, 3])),
            r"lie in 0\.\.2, got 0\.\.3",
        ),
        (
            lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([8]), targets=torch.tensor([0, 1, 1]), symmetric=True),
            "distinct targets",
        ),
        (
            lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([8]), ignore=torch.zeros(3, 2, dtype=torch.bool)),
            r"ignore must be \(3, 3\) bool",
        ),
        (lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([8]), group=torch.tensor([1])), r"group must be \(3,\)"),
        (lambda: nested_info_nce(ONE, ONE, nesting=mt.Nesting([8]), chunk=0), "at least 1 row"),
        (
            lambda: nested_info_nce(BAD, ONE, nesting=mt.Nesting([4, 8])),
            "at width 8 is nan: row 1 of anchors holds NaN",
        ),
        (lambda: nested_info_nce(ONE, BAD, nesting=mt.Nesting([4, 8])), "at width 8 is nan: row 1 of candidates holds"),
        (lambda: nested(lambda x: x.sum(), mt.Nesting([9]))(ONE), "no positional argument is an embedding of width 9"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
