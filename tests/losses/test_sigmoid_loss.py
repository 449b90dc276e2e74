"""The sigmoid loss: chunks change nothing, nothing of B x N x L is kept, and what does not fit is refused."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import matryo as mt
from matryo.losses import nested, nested_sigmoid

ONE = mt.Nesting([2, 4])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(11)


def siglip(anchors, candidates):
    """Algorithm 1 of the paper, on unit vectors."""
    logits = anchors @ candidates.T * 10 - 10
    labels = 2 * torch.eye(len(anchors), dtype=anchors.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(anchors)


def test_readable_form_is_the_same_loss():
    nesting = mt.Nesting([4, 12, 16], [1.0, 0.0, 2.0])
    a, c = torch.randn(2, 9, 16, dtype=torch.float64)
    fast, fast_widths = nested_sigmoid(a, c, nesting=nesting, per_width=True)
    slow, slow_widths = nested(siglip, nesting)(a, c, per_width=True)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    torch.testing.assert_close(fast_widths, slow_widths, rtol=1e-12, atol=0)


def test_float32_gradient_is_near_the_float64_one():
    nesting = mt.Nesting([8, 32, 128])
    a, c = torch.randn(2, 65, 128, dtype=torch.float64)
    gradients = []
    for kind in (torch.float32, torch.float64):
        x = (a + c).to(kind).requires_grad_()
        nested_sigmoid(x, c.to(kind), nesting=nesting, chunk=16).backward()
        gradients.append(x.grad.double())
    assert float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()) <= 1e-5


def test_one_tensor_on_both_sides_and_an_upstream_factor():
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (3 * nested_sigmoid(x, x.roll(1, 0), nesting=ONE, chunk=2)).backward()
    (3 * nested(siglip, ONE)(y, y.roll(1, 0))).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_numbers_and_learned_tensors_agree():
    a, c = torch.randn(2, 5, 4)
    scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor([-3.0, -4.0], requires_grad=True)
    learned = nested_sigmoid(a, c, nesting=ONE, scale=scale, bias=bias)
    assert bool(learned == nested_sigmoid(a, c, nesting=ONE, scale=7.0, bias=[-3.0, -4.0]))
    learned.backward()  # the embeddings need no gradient here
    assert scale.grad.shape == ()
    assert bias.grad.shape == (2,)


def test_half_precision_and_autocast():
    a, c = torch.randn(2, 9, 4, dtype=torch.bfloat16)
    a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = nested_sigmoid(a, c, nesting=ONE)
    value.backward()
    assert value.dtype == torch.float32
    assert a.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, nested_sigmoid(a.float(), c.float(), nesting=ONE), rtol=0, atol=0)


def test_zero_rows_have_finite_gradients():
    a, c = torch.randn(2, 5, 4)
    a[1], c[2, :2] = 0, 0
    a.requires_grad_()
    c.requires_grad_()
    nested_sigmoid(a, c, nesting=ONE).backward()
    assert a.grad.isfinite().all()
    assert c.grad.isfinite().all()


def test_no_gradient_no_gradient_work():
    a, c = torch.randn(2, 5, 4, requires_grad=True)
    with torch.no_grad():
        assert not nested_sigmoid(a, c, nesting=ONE).requires_grad


MEMORY = """
import resource, torch, matryo as mt
from matryo.losses import nested_sigmoid
nesting = mt.Nesting([2, 4, 6, 8, 10, 12])
def step(size):
    a, c = (torch.randn(size, 12, requires_grad=True) for _ in range(2))
    nested_sigmoid(a, c, nesting=nesting, chunk=32).backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(3072)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_that_of_a_chunk():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, check=True)
    one_matrix_per_width = 6 * 3072 * 3072 * 4 / 2**20  # 216 MiB, of which a graph would keep several
    assert float(done.stdout) < one_matrix_per_width / 2


X = torch.randn(3, 4)
ALIKE = torch.ones(3, 4)
BAD = X.clone()
BAD[1, 2] = torch.inf


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((X, X[:2]), {}, "3 anchors need at least 3 candidates"),
        ((X[:1], X[:1]), {}, "no negative to tell from; give at least 2 candidates"),
        ((X, X[:, :3]), {}, "ends at width 4 but the vectors have 3"),
        ((X, X), {"scale": -1.0}, "scale must be finite and above 0, got -1.0"),
        ((X, X), {"bias": float("nan")}, "bias must be finite, got nan"),
        ((X, X), {"bias": [1.0]}, r"bias must be one number or one per width \(2\)"),
        ((X, X), {"ignore": torch.zeros(3, 2, dtype=torch.bool)}, r"ignore must be \(3, 3\) bool"),
        ((X, X), {"group": torch.tensor([1])}, r"group must be \(3,\)"),
        ((X, X), {"chunk": 0}, "chunk must be at least 1 row, got 0"),
        ((X, BAD), {}, "the loss at width 4 is nan: row 1 of candidates holds NaN or Inf"),
        ((ALIKE, ALIKE), {"scale": 3e38}, "though every input is finite"),
    ],
)
def test_bad_input_is_named(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        nested_sigmoid(*arguments, nesting=ONE, **options)
