"""Any sentence-transformers folder or hub name, its pooling and steps kept. Needs the `train` extra."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from matryo.encoders.layers import Layers


class SentenceTransformerEncoder:
    """A sentence-transformers model as an encoder of full-width vectors."""

    def __init__(self, model: Any) -> None:
        width = model.get_embedding_dimension()
        if not width:
            raise InputError("the model does not say how many dimensions its vectors have")
        self.model = model
        self.width = int(width)
        self._depths: dict[int, SentenceTransformerEncoder] = {}
        self._found: Layers | None = None

    @property
    def layers(self) -> "Layers":
        """The blocks of the encoder.

        Raises:
            InputError: it has none that can be cut.
        """
        if self._found is None:
            from matryo.encoders.layers import Layers

            self._found = Layers(self.model)
        return self._found

    def at(self, depth: int) -> "SentenceTransformerEncoder":
        """The encoder of the first `depth` layers, trained at that depth or not. It shares its weights with this one.

        Raises:
            InputError: a depth beyond the encoder's, or layers that cannot be cut.
        """
        if depth not in self._depths:
            self._depths[depth] = SentenceTransformerEncoder(self.layers.cut(depth))
        return self._depths[depth]

    @classmethod
    def load(cls, name: str, device: str | None = None) -> "SentenceTransformerEncoder":
        """From a folder or a hub name. Only safetensors weights, never remote code."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtraError("sentence-transformers", "train", f"the model {name!r}") from error
        check_device(device)
        try:
            with _no_bar_in_a_pipe():
                model = SentenceTransformer(
                    name, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
                )
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            reason = str(error).strip().splitlines()
            raise InputError(
                f"cannot load model {name!r}: {reason[0] if reason else type(error).__name__}; give a Matryo or "
                "sentence-transformers folder, a hub name that this machine can reach, or 'toy'"
            ) from error
        return cls(model)

    def vectors(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> NDArray[np.float32]:
        """(N, D) vectors as the model gives them."""
        if not texts:
            return np.zeros((0, self.width), dtype=np.float32)
        out = self.model.encode(
            list(texts), batch_size=batch_size, show_progress_bar=progress, convert_to_numpy=True, truncate_dim=None
        )
        return np.asarray(out, dtype=np.float32)


def check_device(name: str | None) -> None:
    """Raise an InputError unless torch can put a tensor there; None leaves the choice to torch."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"device {name!r} cannot be used: {reason}; give cpu, cuda or another that torch has here, or none"
        ) from error


@contextmanager
def _no_bar_in_a_pipe() -> Iterator[None]:
    """transformers shows a bar while it reads weights; where standard error is not a terminal, it does not."""
    from transformers.utils import logging

    noise: Any = logging
    shown = noise.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        noise.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            noise.enable_progress_bar()
