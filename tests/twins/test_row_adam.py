"""RowAdam against torch's SparseAdam: the same weights after several steps, and rows never touched are never moved."""

import torch

from matryo.training import row_adam
from matryo.training.row_adam import RowAdam


def test_same_update_as_sparse_adam(monkeypatch):
    monkeypatch.setattr(row_adam, "BLOCK", 5)
    make = torch.Generator().manual_seed(0)
    start = torch.randn(40, 6, generator=make, dtype=torch.float64)
    weights = [start.clone().requires_grad_() for _ in range(2)]
    optimizers = [RowAdam([weights[0]], lr=0.1), torch.optim.SparseAdam([weights[1]], lr=0.1)]
    for step in range(7):
        rows = torch.randperm(30, generator=make)[: 3 + 3 * step].sort().values
        values = torch.randn(len(rows), 6, generator=make, dtype=torch.float64)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=True)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(weights[0][30:], start[30:])


def test_state_survives_a_round_trip():
    weight = torch.ones(4, 2, requires_grad=True)
    optimizer = RowAdam([weight], lr=0.1)
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), weight.shape, check_invariants=True)
    optimizer.step()
    other = RowAdam([weight], lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[weight]["step"] == 1
    assert torch.equal(other.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
