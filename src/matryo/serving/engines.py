"""Engines: texts to tokens, tokens to full-width vectors. And which one a model gets, with the reason."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.encoders import Card, Model, load
from matryo.encoders.folder import fingerprint

Float32s = NDArray[np.float32]
Ids = list[int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One input as the model reads it."""

    ids: Ids
    text: str | None
    """The text behind the ids, for engines that tokenise anew; None for input that came as ids."""


class Engine(Protocol):
    """What runs a model."""

    name: str
    width: int
    """Full width D."""
    max_tokens: int | None
    """Longest input the model takes, or None where any length goes."""
    pads: bool
    """Whether a batch costs as much as its longest input times its size."""
    inline_tokens: int
    """A batch of at most so many tokens is over sooner than another thread could have started on it."""
    vocabulary: int | None
    """Number of tokens, for engines that take ids as input."""

    def tokens(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, special tokens included, nothing cut off."""

    def cut(self, ids: Ids, length: int) -> Ids:
        """The first tokens of an input, special ones kept, `length` in all."""

    def vectors(self, batch: Sequence[Tokens]) -> Float32s:
        """(N, D) float32, not normalised, in order. An input's row does not depend on the others."""


class StaticEngine:
    """The mean of token vectors: numpy and tokenizers."""

    name = "static"
    pads = False
    inline_tokens = 2048
    max_tokens: int | None = None

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.width: int = encoder.width
        self.vocabulary: int | None = len(encoder.table)

    def tokens(self, texts: Sequence[str]) -> list[Ids]:
        found: list[Ids] = self._encoder.tokens(texts)
        return found

    def cut(self, ids: Ids, length: int) -> Ids:
        return ids[:length]

    def vectors(self, batch: Sequence[Tokens]) -> Float32s:
        means: Float32s = self._encoder.means([one.ids for one in batch])
        return means


class PlainEngine:
    """Any encoder of texts behind `matryo.load`, its tokens counted by its own tokeniser. The slow, faithful way."""

    pads = True
    inline_tokens = 0
    vocabulary: int | None = None

    def __init__(self, model: Model) -> None:
        inner = getattr(model.encoder, "model", None)
        self._encoder, self._tokenizer = model.encoder, getattr(inner, "tokenizer", None)
        self.name = "torch" if inner is not None else "toy"
        self.width = model.width
        self.max_tokens: int | None = getattr(inner, "max_seq_length", None)

    def tokens(self, texts: Sequence[str]) -> list[Ids]:
        if self._tokenizer is None:  # the toy's tokens are words, and nobody looks at their numbers
            return [[0] * len(text.split()) for text in texts]
        found: list[Ids] = self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return found

    def cut(self, ids: Ids, length: int) -> Ids:
        return ids[:length]  # the encoder cuts the text itself, at the same length

    def vectors(self, batch: Sequence[Tokens]) -> Float32s:
        return self._encoder.vectors([one.text or "" for one in batch], max(1, len(batch)), False)


@dataclass(frozen=True)
class Choice:
    """A model ready to serve."""

    engine: Engine
    card: Card
    prompts: dict[str, str]
    default_prompt: str
    reason: str
    """Why this engine, in words for the log."""
    digest: str | None
    """Of the model's weights; an index that was built by others is refused."""


def choose(name: str, backend: str, threads: int) -> Choice:
    """Load a model into the engine asked for, or the quickest that its folder allows.

    Raises:
        InputError: the folder holds no such model, or the backend cannot run it; says what to do.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # requests run side by side, not one on all processors
    folder = Path(name)
    from matryo.encoders.static import StaticEncoder

    if backend in ("openvino",) or (backend == "onnx"):
        raise InputError(f"{name} is no ONNX export")
    model = load(name)
    if isinstance(model.encoder, StaticEncoder):
        if backend not in ("auto", "static"):
            raise InputError(
                f"{name} is a static model; it runs on numpy alone: give --backend static, or leave it out"
            )
        engine: Engine = StaticEngine(model.encoder)
        reason = "a static model needs numpy and its tokeniser only"
    elif backend == "static":
        raise InputError(f"{name} is not a static model; leave --backend out for the right one")
    else:
        engine = PlainEngine(model)
        reason = "the toy model" if engine.name == "toy" else "no ONNX export"
    digest = fingerprint(str(folder)).get("blake2b")
    return Choice(engine, model.card, {}, "", reason, digest)
