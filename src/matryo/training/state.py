"""Training state as safetensors and JSON: nothing of ours is ever pickled or unpickled."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryo.core.errors import DamagedError


def save_state(folder: Path, name: str, state: Any) -> None:
    """A nested structure of dicts, lists, numbers, text and tensors as `name.json` and `name.safetensors`."""
    tensors: dict[str, Tensor] = {}

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous()
            return {"__tensor__": len(tensors) - 1}
        if isinstance(value, dict):
            # Keys of optimiser states are integers, which JSON does not have: keep pairs.
            return {"__dict__": [[key, strip(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [strip(item) for item in value]
        return value

    text = json.dumps(strip(state), allow_nan=False)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text)


def load_state(folder: Path, name: str) -> Any:
    """What `save_state` wrote; tuples come back as lists."""
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        content = json.loads((folder / f"{name}.json").read_text())
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(
            f"the checkpoint {folder} cannot be read ({error}); remove it and resume from the one before"
        ) from error

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[str(value["__tensor__"])]
            return {key: fill(item) for key, item in value["__dict__"]}
        return [fill(item) for item in value] if isinstance(value, list) else value

    return fill(content)


def random_state() -> dict[str, Any]:
    """Every random state a run depends on."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the trainer's own generator
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
