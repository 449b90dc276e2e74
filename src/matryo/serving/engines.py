"""Engines: texts to tokens, tokens to full-width vectors. And which one a model gets, with the reason."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.encoders import Card, Model, load, model_of
from matryo.encoders.folder import fingerprint, read_card
from matryo.encoders.onnx import OnnxEncoder
from matryo.encoders.static import StaticEncoder

Float32s = NDArray[np.float32]
Ids = list[int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One input as the model reads it."""

    ids: Ids
    text: str | None
    """The text behind the ids, for engines that tokenise anew; None for input that came as ids."""
    depth: int | None = None
    """Layers to run; None for all of them."""


class Engine(Protocol):
    """What runs a model."""

    name: str
    width: int
    """Full width D."""
    max_tokens: int | None
    """Longest input the model takes, or None where any length goes."""
    pads: bool
    """Whether a batch costs as much as its longest input times its size."""
    layers: int | None
    """Layers of the model; None where it has none, or does not say."""
    inline_tokens: int
    """A batch of at most so many tokens is over sooner than another thread could have started on it."""
    vocabulary: int | None
    """Number of tokens, for engines that take ids as input."""

    def tokens(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, special tokens included, nothing cut off."""

    def cut(self, ids: Ids, length: int) -> Ids:
        """The first tokens of an input, special ones kept, `length` in all."""

    def vectors(self, batch: Sequence[Tokens]) -> Float32s:
        """(N, D) float32, not normalised, in order, each of its input's depth. A row does not depend on the others."""


class StaticEngine:
    """The mean of token vectors: numpy and tokenizers."""

    name = "static"
    pads = False
    inline_tokens = 2048
    max_tokens: int | None = None
    layers: int | None = None

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


class OnnxEngine:
    """An exported transformer: onnxruntime or OpenVINO, tokenizers and numpy."""

    pads = True
    inline_tokens = 0

    def __init__(self, encoder: Any, name: str, layers: int | None) -> None:
        self._encoder, self.name, self.layers = encoder, name, layers
        self.width: int = encoder.width
        self.max_tokens: int | None = encoder.about.max_tokens
        self.vocabulary: int | None = encoder.tokenizer.get_vocab_size()

    def tokens(self, texts: Sequence[str]) -> list[Ids]:
        found: list[Ids] = self._encoder.tokens(texts)
        return found

    def cut(self, ids: Ids, length: int) -> Ids:
        cut: Ids = self._encoder.cut(ids, length)
        return cut

    def vectors(self, batch: Sequence[Tokens]) -> Float32s:
        rows: Float32s = self._encoder.rows([one.ids for one in batch])
        return rows


class PlainEngine:
    """Any encoder of texts behind `matryo.load`, its tokens counted by its own tokeniser. The slow, faithful way."""

    pads = True
    inline_tokens = 0
    vocabulary: int | None = None

    def __init__(self, model: Model) -> None:
        self._model, self._encoder = model, model.encoder
        self._inner = getattr(model.encoder, "model", None)
        self.name = "toy" if self._inner is None else "torch"
        self.width = model.width
        self.max_tokens: int | None = getattr(self._inner, "max_seq_length", None)
        config = getattr(getattr(next(iter(self._inner or ()), None), "auto_model", None), "config", None)
        self.layers: int | None = getattr(config, "num_hidden_layers", None)
        if self._inner is not None:
            self._inner.default_prompt_name = None  # texts come with their prompt in front

    def tokens(self, texts: Sequence[str]) -> list[Ids]:
        if self._inner is None:  # the toy's tokens are words, told apart by nothing but themselves
            return [list(text.lower().encode()) for text in texts]
        found: list[Ids] = self._inner.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return found

    def cut(self, ids: Ids, length: int) -> Ids:
        return ids[:length]  # the encoder cuts the text itself, at the same length

    def vectors(self, batch: Sequence[Tokens]) -> Float32s:
        rows = np.empty((len(batch), self.width), dtype=np.float32)
        for depth in {one.depth for one in batch}:
            places = [n for n, one in enumerate(batch) if one.depth == depth]
            encoder: Any = self._encoder if depth is None else self._model.at(depth).encoder
            rows[places] = encoder.vectors([batch[n].text or "" for n in places], len(places), False)
        return rows


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
    if (folder / "onnx.json").is_file():
        return _exported(folder, backend, threads)
    if backend in ("onnx", "openvino"):
        raise InputError(f"{name} is no export; make one with: matryo export {name} --onnx FOLDER, and serve that")
    model = load(name)
    digest = fingerprint(name).get("blake2b")
    if isinstance(model.encoder, StaticEncoder):
        if backend not in ("auto", "static"):
            raise InputError(f"{name} is a static model, which needs numpy alone: leave --backend out, or give static")
        reason = "a static model needs numpy and its tokeniser only"
        return Choice(StaticEngine(model.encoder), model.card, {}, "", reason, digest)
    if backend == "static":
        raise InputError(f"{name} is not a static model; leave --backend out for the right one")
    inner = getattr(model.encoder, "model", None)
    prompts = {} if inner is None else dict(inner.prompts)
    default = "" if inner is None else prompts.get(inner.default_prompt_name or "", "")
    engine = PlainEngine(model)
    if engine.name == "torch":
        _torch_threads(threads)
    reason = {"auto": "not exported; 'matryo export MODEL --onnx FOLDER' makes it several times cheaper"}.get(
        backend, "as asked"
    )
    return Choice(engine, model.card, prompts, default, reason, digest)


def _exported(folder: Path, backend: str, threads: int) -> Choice:
    if backend not in ("auto", "onnx", "openvino"):
        raise InputError(f"{folder} is an export for onnxruntime or OpenVINO; --backend {backend} cannot run it")
    runtime = "openvino" if backend == "openvino" else "onnxruntime"
    encoder = OnnxEncoder.load(folder, threads=threads, runtime=runtime)
    about = encoder.about
    engine = OnnxEngine(encoder, "openvino" if backend == "openvino" else "onnx", layers_of(folder))
    reason = "as asked" if backend != "auto" else f"an export ({about.precision}) runs on onnxruntime, without torch"
    default = about.prompts.get(about.default_prompt or "", "")
    # An export is the graph of one depth.
    card = replace(model_of(encoder, read_card(folder), folder).card, depths=None)
    return Choice(engine, card, about.prompts, default, reason, fingerprint(str(folder)).get("blake2b"))


def layers_of(folder: Path) -> int | None:
    """What an export's `config.json`, copied from its model, says."""
    path = folder / "config.json"
    found = json.loads(path.read_text()).get("num_hidden_layers") if path.is_file() else None
    return found if type(found) is int else None


def _torch_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
