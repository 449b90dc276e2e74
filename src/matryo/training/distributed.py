"""What several processes need besides gathered embeddings: one configuration, and averaged gradients outside DDP."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matryo.core.errors import InputError
from matryo.losses.gather import all_gather, processes, row_counts


def check_agreement(config: Mapping[str, Any] | str) -> None:
    """Fail on every process, before the first step, when processes were started with different configurations.

    Call it on every process, once. Texts are exchanged as bytes; nothing is unpickled. Two small collectives.

    Args:
        config: anything JSON can hold (the configuration, digests of the data); or a digest.

    Raises:
        InputError: names the first process that differs from process 0, and where.
    """
    if processes() == 1:
        return
    text = config if isinstance(config, str) else json.dumps(config, sort_keys=True, default=str)
    texts = _exchange(text)
    for rank, other in enumerate(texts):
        if other != texts[0]:
            where = "" if isinstance(config, str) else _first_difference(json.loads(texts[0]), json.loads(other))
            raise InputError(
                f"processes disagree on the configuration: process {rank} differs from process 0{where}; "
                f"start every process with the same configuration and data"
            )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Parameters that no DDP wraps (a loss's heads, a learned temperature): start them equal, average their gradients.

    Every process gets process 0's values now, and after each backward pass the mean of all gradients, by one all-reduce
    a parameter. With gradient accumulation the sum of means is still the mean of sums. Without a process group nothing
    happens.
    """
    if processes() == 1:
        return
    for parameter in parameters:
        dist.broadcast(parameter.data, src=0)
        if parameter.requires_grad:
            hook: Any = parameter.register_post_accumulate_grad_hook
            hook(_average)


def _average(parameter: Tensor) -> None:
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= processes()


def _exchange(text: str) -> list[str]:
    device = _device()
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    sizes = row_counts(len(own), device)
    sent = own.new_zeros(max(sizes))
    sent[: len(own)] = own
    received = sent.new_empty(processes() * len(sent))
    all_gather(received, sent)
    rows = received.view(processes(), -1).cpu().numpy()
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _device() -> torch.device:
    """Where the default process group can work: NCCL has no CPU tensors."""
    return torch.device("cpu" if "cpu" in dist.get_backend_config() else "cuda")


def _first_difference(ours: Any, theirs: Any, path: str = "") -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            found = _first_difference(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if ours == theirs else f" ({path} is {json.dumps(theirs)} there and {json.dumps(ours)} on process 0)"
