"""Adam on the rows a batch touched, in blocks of rows that stay in a cache."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 1024
"""Rows updated at a time: with 512 dimensions the four arrays of a block are 8 MB, so the passes after the first read a
cache and not memory."""


class RowAdam(torch.optim.Optimizer):
    """torch.optim.SparseAdam's update (Adam, arXiv 1412.6980, algorithm 1, moments of untouched rows left alone) for
    coalesced row-sparse gradients, at less than half its time: rows are gathered, updated and put back block by block,
    where SparseAdam makes a sparse tensor of all touched rows for every intermediate result. What has a dense gradient
    (a head, a learned temperature) gets the same update as a whole.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        (first, second), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        size = group["lr"] * (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
        gradient: Any = weight.grad
        if not gradient.is_sparse:
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            weight.add_(mean / square.sqrt().add_(group["eps"]), alpha=-size)
            return
        gradient = gradient.coalesce()
        blocks = zip(gradient.indices()[0].split(BLOCK), gradient.values().split(BLOCK), strict=True)
        for rows, values in blocks:
            m = mean.index_select(0, rows).lerp_(values, 1 - first)
            v = square.index_select(0, rows).mul_(second).addcmul_(values, values, value=1 - second)
            mean.index_copy_(0, rows, m)
            square.index_copy_(0, rows, v)
            weight.index_add_(0, rows, m.div_(v.sqrt_().add_(group["eps"])), alpha=-size)
