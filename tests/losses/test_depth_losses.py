"""Layers x widths against the definition, spelled out."""

import pytest
import torch
import torch.nn.functional as F

from matryo import Nesting
from matryo.core.depths import DepthNesting
from matryo.core.errors import InputError
from matryo.losses import nested_distill, nested_info_nce, over_depths

WIDTHS = Nesting([4, 8, 16], [1, 0.5, 2])


def columns(depths: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(5, depths, 16, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2)]


def info_nce(own, nesting):
    return nested_info_nce(own[0], own[1], nesting=nesting, per_width=True)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def distance(kind, student, teacher, temperature):
    if kind == "cosine":
        return (1 - (student * teacher).sum(1)).mean()
    if kind == "mse":
        return ((student - teacher) ** 2).sum(1).mean()
    if kind == "neighbours":
        others = ~torch.eye(len(student), dtype=torch.bool)
        s, t = student @ student.T, teacher @ teacher.T
        spread, aim = (x[others].detach().std(correction=0) for x in (s, t))
        s, t = s / (temperature * spread / aim), t / temperature
        p, q = (x.exp() * others / (x.exp() * others).sum(1, keepdim=True) for x in (t, s))
        return (p[others] * (p[others] / q[others]).log()).sum() / len(s)
    if kind == "similarity":
        return ((student @ student.T - teacher @ teacher.T) ** 2).mean()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("kind", ["kl", "cosine", "mse", "similarity", "neighbours"])
@pytest.mark.parametrize("widths", [None, [[4], [4, 8], [4, 8, 16]]])
def test_value_and_gradient_are_those_of_the_definition(kind, widths):
    depths = DepthNesting.of([2, 3, 5], WIDTHS, [0.5, 1, 2], widths, align=0.7, alignment=kind, temperature=0.4)
    given = columns()
    total, found = over_depths(info_nce, given, depths)
    total.backward()
    mine = [x.grad.clone() for x in given]

    again = columns()
    expected = torch.zeros((), dtype=torch.float64)
    for place, (weight, nesting) in enumerate(zip(depths.weights, depths.nestings, strict=True)):
        for d, c in nesting:
            a, b = (unit(x[:, place, :d]) for x in again)
            expected = expected + weight * c * F.cross_entropy(a @ b.T / 0.05, torch.arange(5))
            if place < 2:
                student = torch.cat([a, b])
                met = nesting.D if kind == "neighbours" else d
                teacher = torch.cat([unit(x[:, -1, :met]) for x in again]).detach()
                expected = expected + weight * 0.7 * c * distance(kind, student, teacher, 0.4)
    expected.backward()
    torch.testing.assert_close(total, expected)
    for own, x in zip(mine, again, strict=True):
        torch.testing.assert_close(own, x.grad)
    assert [n.widths for n, _ in found.values()] == [n.widths for n in depths.nestings]
    assert list(found) == [2, 3, 5]
    for place, (nesting, values) in enumerate(found.values()):
        cut = [x[:, place, : nesting.D] for x in again]
        torch.testing.assert_close(values, info_nce(cut, nesting)[1])


def test_without_alignment_one_depth_is_the_plain_loss():
    depths = DepthNesting.of([4], WIDTHS)
    given = columns(1)
    total, _ = over_depths(info_nce, given, depths)
    torch.testing.assert_close(total, info_nce([x[:, 0] for x in given], WIDTHS)[0])


def test_columns_of_other_depths_are_refused():
    with pytest.raises(InputError, match=r"columns must be \(B, 2, D\), one for each depth, got \(5, 3, 16\)"):
        over_depths(info_nce, columns(3), DepthNesting.of([1, 2], WIDTHS))


def test_an_error_names_the_depth():
    given = [x.detach() for x in columns()]
    given[0][2, 1, 3] = torch.nan
    with pytest.raises(InputError, match=r"depth 3: .*row 2"):
        over_depths(info_nce, given, DepthNesting.of([2, 3, 5], WIDTHS))


def test_kl_of_equal_vectors_is_zero():
    x = torch.randn(6, 16, dtype=torch.float64)
    total, values = nested_distill(x, 3 * x, nesting=WIDTHS, kind="kl", per_width=True)
    assert abs(float(total)) < 1e-12
    assert values.shape == (3,)
    with pytest.raises(InputError, match="temperature must be finite and above 0, got 0"):
        nested_distill(x, x, nesting=WIDTHS, kind="kl", temperature=0)
