"""Several processes that train one model: who writes, and one mean of all gradients a step.

The trainer wraps the model in DDP, which starts every process with the same weights. Its own reduction is left alone:
it begins while backward still runs, and so cannot know that a cached step replays the encoder, that a table's gradient
is sparse in rows, or that a loss has parameters that no wrapper holds. Here everything is reduced when backward is
done, the dense gradients of all parameters as one.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from matryo.core.errors import InputError, UnavailableError
from matryo.losses import gather

BROKEN = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error")
"""What errors of collectives say that are no class of their own."""


def join(device: str | None) -> None:
    """Meet the other processes that torchrun or accelerate started; nothing if this one is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


@contextmanager
def losses_of_others() -> Iterator[None]:
    """Say it in our words where the connection to another process of the run breaks, or is silent for too long."""
    try:
        yield
    except RuntimeError as error:
        broken = isinstance(error, dist.DistError) or any(words in str(error) for words in BROKEN)
        if count() == 1 or not broken:
            raise
        raise UnavailableError(
            f"another of the {count()} processes is gone ({' '.join(str(error).split())[:200]}); this one stops too. "
            "The newest checkpoint is whole: start all of them again with the same command and --resume"
        ) from error


def leave() -> None:
    """Close the connections that `join` opened."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return gather.processes()


def is_main() -> bool:
    """Whether this is the process that writes and reports."""
    return count() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        dist.barrier()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any process."""
    if count() == 1:
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


def total(x: Tensor) -> Tensor:
    """The sum over the processes."""
    if count() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def check_batch(batch_size: int) -> None:
    """Raise unless a step's rows can be shared out evenly."""
    if batch_size % count():
        raise InputError(
            f"batch_size {batch_size} counts the rows of all processes together and must be a multiple of their "
            f"number, {count()}; try {max(1, batch_size // count()) * count()}"
        )


def reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes.

    A step leaves the same parameters without a gradient on every process, because all take the same data set and the
    same widths. Dense gradients travel in one buffer per dtype. Row-sparse gradients, which NCCL cannot reduce, are
    gathered as rows and added up in the order of the processes, so that all get the same bits.
    """
    dense: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = _mean_of_rows(parameter.grad)
        else:
            dense.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in dense.values():
        whole = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(whole)
        whole /= count()
        start = 0
        for gradient in gradients:
            gradient.copy_(whole[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()


def _mean_of_rows(gradient: Tensor) -> Tensor:
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values() / count()
    sizes = gather.row_counts(len(rows), rows.device)
    all_rows, all_values = (_everyone(x, sizes) for x in (rows, values))
    both = torch.sparse_coo_tensor(all_rows[None], all_values, gradient.shape, check_invariants=False)
    return both.coalesce()


def _everyone(x: Tensor, sizes: list[int]) -> Tensor:
    """The first `sizes[r]` rows of every process r, one after the other."""
    sent = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    received = sent.new_empty(len(sizes) * len(sent), *x.shape[1:])
    gather.all_gather(received, sent)
    parts = received.view(len(sizes), len(sent), *x.shape[1:])
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
