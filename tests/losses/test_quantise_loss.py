import numpy as np
import pytest
import torch

import matryo as mt
from matryo.core.codecs import codec
from matryo.losses import nested_info_nce, nested_quantised_info_nce, straight_through
from matryo.losses.quantise import int8_scale


def rows(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("width", [8, 24, 40])
@pytest.mark.parametrize("code", ["float32", "int8", "binary"])
def test_forwards_it_is_the_codec_bit_for_bit(code, width):
    x = rows(50, 40) * 7
    prefixes = mt.truncate(x, width).numpy()
    fitted = codec(code, width).fit(prefixes)
    expected = fitted.decode(fitted.encode(prefixes))
    np.testing.assert_array_equal(straight_through(x, code, width).numpy(), expected)


def test_int8_with_a_given_scale_is_the_codec_that_has_it():
    documents, queries = rows(40, 32), rows(30, 32, seed=1)
    fitted = codec("int8", 16).fit(mt.truncate(documents, 16).numpy())
    step = int8_scale(documents, 16)
    np.testing.assert_array_equal(step.numpy(), fitted.state["scale"])
    expected = fitted.decode(fitted.encode(mt.truncate(queries, 16).numpy()))
    np.testing.assert_array_equal(straight_through(queries, "int8", 16, step).numpy(), expected)


@pytest.mark.parametrize("code", ["float32", "int8", "binary"])
def test_backwards_it_is_the_gradient_of_truncate(code):
    x, upstream = rows(9, 24, dtype=torch.float64), rows(9, 16, seed=1, dtype=torch.float64)
    got, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    straight_through(got, code, 16).backward(upstream)
    mt.truncate(expected, 16).backward(upstream)
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-14, atol=0)


def test_out_of_range_passes_no_gradient():
    x = torch.tensor([[3.0, 0.1, -0.2, 0.3, 0.1, -0.1, 0.2, -4.0]], dtype=torch.float64)
    y = mt.truncate(x, 8).requires_grad_()
    # Rows of length 1: what the coordinates receive, less its radial part, comes back.
    ones = torch.ones_like(y)
    for call, inside in (
        (lambda: straight_through(y, "binary", 8, clip=1.0), y.abs() * 8**0.5 <= 1),
        (lambda: straight_through(y, "int8", 8, torch.full((8,), 0.4 / 127)), y.abs() <= 0.4),
    ):
        y.grad = None
        call().backward(ones)
        assert inside.tolist() == [[False, True, True, True, True, True, True, False]]
        passed = inside.to(y)
        torch.testing.assert_close(y.grad, passed - (passed * y).sum() * y.detach(), rtol=1e-12, atol=1e-12)


def test_half_precision_is_widened_and_autocast_is_off():
    x = rows(12, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nested_quantised_info_nce(x, x * 2, nesting=mt.Nesting([8, 16]), codes={"int8": 1, "binary": 1})
    assert inside.dtype == torch.float32
    assert inside == nested_quantised_info_nce(x, x * 2, nesting=mt.Nesting([8, 16]), codes={"int8": 1, "binary": 1})
    half = x.bfloat16().requires_grad_()
    out = straight_through(half, "int8", 8)
    out.sum().backward()
    assert (out.dtype, half.grad.dtype) == (torch.float32, torch.bfloat16)


def test_zero_rows_are_finite_and_pass_no_gradient():
    x = rows(6, 16)
    x[2] = 0
    x[3, :8] = 0
    a, c = x.clone().requires_grad_(), x.clone().requires_grad_()
    codes = {"float32": 1.0, "int8": 1.0, "binary": 1.0}
    value = nested_quantised_info_nce(a, c, nesting=mt.Nesting([8, 16]), codes=codes)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(c.grad).all()


def test_float32_alone_is_nested_info_nce():
    a, c = rows(9, 16), rows(12, 16, seed=1)
    nesting, group = mt.Nesting([4, 16], [2.0, 1.0]), torch.arange(9) // 2
    total, values = nested_quantised_info_nce(
        a, c, nesting=nesting, codes={"float32": 1.0}, group=group, symmetric=True, per_width=True
    )
    expected, widths = nested_info_nce(a, c, nesting=nesting, group=group, symmetric=True, per_width=True)
    assert total == expected
    assert list(values) == ["float32"]
    assert torch.equal(values["float32"], widths)


def test_temperature_per_code_and_a_code_of_weight_zero_is_only_measured():
    a, c = rows(9, 16).requires_grad_(), rows(12, 16, seed=1)
    nesting, temperature = mt.Nesting([8, 16]), {"float32": 0.05, "binary": [0.2, 0.1]}
    total, values = nested_quantised_info_nce(
        a, c, nesting=nesting, codes={"float32": 1.0, "binary": 0.0}, temperature=temperature, per_width=True
    )
    assert total == nested_info_nce(a, c, nesting=nesting)
    _, alone = nested_quantised_info_nce(
        a, c, nesting=nesting, codes={"binary": 3.0}, temperature=[0.2, 0.1], per_width=True
    )
    assert torch.equal(values["binary"], alone["binary"])
    assert not values["binary"].requires_grad


def test_a_weight_for_each_width_multiplies_the_nestings():
    a, c = rows(9, 16).requires_grad_(), rows(12, 16, seed=1)
    codes = {"float32": [1.0, 0.0], "int8": [0.5, 2.0], "binary": [0.0, 0.0]}
    total, values = nested_quantised_info_nce(a, c, nesting=mt.Nesting([8, 16], [1, 3]), codes=codes, per_width=True)
    expected = values["float32"] @ torch.tensor([1.0, 0.0]) + values["int8"] @ torch.tensor([0.5, 6.0])
    torch.testing.assert_close(total.detach(), expected)
    assert torch.isfinite(values["binary"]).all()


def test_training_on_signs_lowers_the_loss_of_signs():
    a, c = rows(32, 64), rows(32, 64, seed=1)
    a.requires_grad_()
    options = {"nesting": mt.Nesting([16, 64]), "codes": {"binary": 1.0}, "temperature": 0.2, "per_width": True}
    optimizer = torch.optim.Adam([a], lr=0.05)
    first = nested_quantised_info_nce(a, c, **options)[1]["binary"]
    for _ in range(30):
        optimizer.zero_grad()
        nested_quantised_info_nce(a, c, **options)[0].backward()
        optimizer.step()
    last = nested_quantised_info_nce(a, c, **options)[1]["binary"]
    assert (last < first / 3).all()


ONE = torch.ones(3, 16)
FIT = mt.Nesting([8, 16])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: straight_through(ONE, "pq8", 8), "unknown code 'pq8'; a loss can train for float32, int8, binary"),
        (lambda: straight_through(ONE, "binary", 12), "multiple of 8, got 12; try 8"),
        (lambda: straight_through(ONE, "int8", 17), r"width 17 is outside 1\.\.16"),
        (lambda: straight_through(ONE, "int8", 8, torch.ones(4)), "scale must be 8 positive numbers"),
        (lambda: straight_through(ONE, "int8", 8, torch.zeros(8)), "scale must be 8 positive numbers"),
        (lambda: straight_through(ONE, "binary", 8, torch.ones(8)), "scale is for int8 and clip for binary"),
        (lambda: straight_through(ONE, "int8", 8, clip=1.0), "scale is for int8 and clip for binary"),
        (lambda: straight_through(ONE, "binary", 8, clip=0.0), "clip must be above 0, got 0"),
        (lambda: nested_quantised_info_nce(ONE, ONE, nesting=mt.Nesting([4, 16])), "multiple of 8, got 4; try 8"),
        (lambda: nested_quantised_info_nce(ONE, ONE, nesting=mt.Nesting([8])), "ends at width 8 but the vectors"),
        (
            lambda: nested_quantised_info_nce(ONE, ONE, nesting=mt.Nesting([8]), codes={"int8": 1.0}),
            "ends at width 8 but the vectors",
        ),
        (lambda: nested_quantised_info_nce(ONE, ONE, nesting=FIT, codes={}), "one of them above 0, got {}"),
        (lambda: nested_quantised_info_nce(ONE, ONE, nesting=FIT, codes={"int8": 0.0}), "one of them above 0"),
        (lambda: nested_quantised_info_nce(ONE, ONE, nesting=FIT, codes={"int8": -1.0}), "finite weights >= 0"),
        (
            lambda: nested_quantised_info_nce(ONE, ONE, nesting=FIT, codes={"int8": [1.0]}),
            r"weight of int8 must be one number or one per width \(2\), got \[1\.0\]",
        ),
        (lambda: nested_quantised_info_nce(ONE, ONE, nesting=FIT, asymmetric=["int4"]), "unknown code 'int4'"),
        (
            lambda: nested_quantised_info_nce(ONE, ONE, nesting=FIT, temperature={"float32": 0.1}),
            "temperature has nothing for binary",
        ),
        (
            lambda: nested_quantised_info_nce(ONE, ONE, nesting=FIT, codes={"int8": 1.0}, temperature=[0.1]),
            r"one number or one per width \(2\)",
        ),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
