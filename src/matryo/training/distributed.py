"""Processes that train together must have been started alike."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

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
