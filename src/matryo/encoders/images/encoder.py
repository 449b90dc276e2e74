"""An image encoder, and its model folder: `image.json`, `model.safetensors`, and the card `matryo.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from matryo.core.errors import DamagedError, InputError
from matryo.core.files import write_atomically, write_text
from matryo.encoders.folder import IMAGE
from matryo.encoders.images.network import Network, NetworkConfig
from matryo.encoders.images.pictures import decode

WEIGHTS = "model.safetensors"


class ImageEncoder:
    """A `Network` as an encoder of pictures: paths, bytes, PIL images or uint8 arrays."""

    modality = "image"

    def __init__(self, network: Network, device: str | None = None) -> None:
        self.network = network.to(device or "cpu").eval()
        self.width = network.width

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None) -> "ImageEncoder":
        """From a model folder.

        Raises:
            InputError: it is no folder of an image encoder.
            DamagedError: what it holds cannot be read or does not fit together.
        """
        folder = Path(folder)
        if not (folder / IMAGE).is_file():
            raise InputError(f"{folder} holds no image encoder: it has no {IMAGE}")
        try:
            network = Network(NetworkConfig.of(json.loads((folder / IMAGE).read_text())))
            network.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DamagedError(f"{folder}: the image encoder cannot be read ({reason[0]})") from error
        return cls(network, device)

    def save(self, folder: str | Path) -> None:
        """Write the network; the card is `matryo.encoders.folder.write_card`'s."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path))
        write_text(folder / IMAGE, json.dumps(self.network.config.plain(), indent=2) + "\n")

    def vectors(self, inputs: Sequence[Any], batch_size: int = 64, progress: bool = False) -> NDArray[np.float32]:
        """(N, D) vectors of N pictures, raw lengths. `progress` is taken for the protocol; no bar is shown."""
        size = self.network.config.size
        out = np.zeros((len(inputs), self.width), dtype=np.float32)
        for start in range(0, len(inputs), batch_size):
            chunk = inputs[start : start + batch_size]
            ready = isinstance(chunk, np.ndarray) and chunk.dtype == np.uint8 and chunk.shape[1:] == (size, size, 3)
            pixels = chunk if ready else [decode(x, size, f"inputs[{start + n}]") for n, x in enumerate(chunk)]
            out[start : start + len(chunk)] = self._embed(np.ascontiguousarray(pixels))
        return out

    @torch.inference_mode()
    def _embed(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        device = next(self.network.parameters()).device
        found: NDArray[np.float32] = self.network(torch.tensor(pixels_BHWC, device=device)).float().cpu().numpy()
        return found
