"""Static text encoders: a tokeniser, a table of token vectors, the mean. numpy and tokenizers only, no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from matryo.core.errors import DamagedError, InputError

Float32s = NDArray[np.float32]


class StaticEncoder:
    """The mean of the vectors of a text's tokens, as sentence-transformers' StaticEmbedding computes it."""

    def __init__(self, tokenizer: Tokenizer, table: Float32s) -> None:
        if table.ndim != 2 or len(table) < tokenizer.get_vocab_size():
            raise InputError(
                f"the table must be (tokens, D) with {tokenizer.get_vocab_size()} tokens, got {table.shape}"
            )
        self.tokenizer = tokenizer
        self.table = table
        tokenizer.no_padding()

    @property
    def width(self) -> int:
        """Full width D."""
        return int(self.table.shape[1])

    @classmethod
    def load(cls, folder: Path) -> "StaticEncoder":
        """From `tokenizer.json` and `model.safetensors` of a folder."""
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tensors = load_file(folder / "model.safetensors")
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedError(f"{folder}: the static model cannot be read ({error})") from error
        except Exception as error:  # tokenizers raises bare Exception for malformed files
            raise DamagedError(f"{folder}/tokenizer.json cannot be read ({error})") from error
        if "embedding.weight" not in tensors:
            raise InputError(f"{folder}: model.safetensors has no 'embedding.weight', it has {sorted(tensors)}")
        return cls(tokenizer, tensors["embedding.weight"].astype(np.float32, copy=False))

    def vectors(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> Float32s:
        """(N, D) means. A text without a single known token gives zeros, which the model refuses by position."""
        out = np.empty((len(texts), self.width), dtype=np.float32)
        for start in range(0, len(texts), 4096):
            chunk = texts[start : start + 4096]
            out[start : start + len(chunk)] = self.means(self.tokens(chunk))
        return out

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def means(self, ids: Sequence[list[int]]) -> Float32s:
        """(N, D) means of the vectors of N lists of tokens, zeros for an empty list."""
        out = np.zeros((len(ids), self.width), dtype=np.float32)
        for n, tokens in enumerate(ids):
            if tokens:
                np.mean(self.table[tokens], axis=0, out=out[n])
        return out
