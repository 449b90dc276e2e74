"""An exported transformer: onnxruntime or OpenVINO, tokenizers and numpy. No torch.

A folder holds `model.onnx` (the whole model: transformer, pooling and what follows it), `tokenizer.json`, and
`onnx.json`: format, width, longest input, prompts, digests of both files and of the model it came from.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from matryo.core.errors import DamagedError, FormatError, InputError, MissingExtraError
from matryo.core.files import digest

Float32s = NDArray[np.float32]
Integers = NDArray[np.int64]
Runner = Callable[[Integers, Integers], Float32s]
"""(N, T) ids and (N, T) mask of what is no padding, to (N, D) vectors."""

FORMAT = 1
ABOUT, MODEL, TOKENIZER = "onnx.json", "model.onnx", "tokenizer.json"


@dataclass(frozen=True)
class About:
    """What `onnx.json` says."""

    width: int
    max_tokens: int
    pad: int
    precision: str
    """fp32 or int8."""
    prompts: dict[str, str]
    default_prompt: str | None
    source: dict[str, Any]
    """Name and digest of the model it was exported from."""


class OnnxEncoder:
    """Vectors as sentence-transformers gives them, to about 1e-6, from an exported folder."""

    def __init__(self, run: Runner, tokenizer: Tokenizer, about: About) -> None:
        self.run, self.tokenizer, self.about = run, tokenizer, about
        tokenizer.no_padding()
        tokenizer.no_truncation()  # lengths are counted in full, and cut here

    @property
    def width(self) -> int:
        """Full width D."""
        return self.about.width

    @classmethod
    def load(cls, folder: Path, *, threads: int | None = None, runtime: str = "onnxruntime") -> "OnnxEncoder":
        """From an exported folder whose files are as they were written.

        Args:
            threads: of one run; the runtime's choice by default.
            runtime: "onnxruntime" or "openvino".

        Raises:
            DamagedError, FormatError: a file differs from its digest, or another release wrote the folder.
            MissingExtraError: the runtime is not installed.
        """
        about = read_about(folder)
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # tokenizers raises bare Exception for malformed files
            raise DamagedError(f"{folder}/{TOKENIZER} cannot be read ({error})") from error
        opened = _openvino if runtime == "openvino" else _onnxruntime
        return cls(opened(folder / MODEL, threads), tokenizer, about)

    def with_graph(self, path: Path, threads: int | None = None) -> "OnnxEncoder":
        """The same tokeniser before another graph, which is taken as it is."""
        return OnnxEncoder(_onnxruntime(path, threads), self.tokenizer, self.about)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special ones included, however many."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(list(texts))]

    def cut(self, ids: list[int], length: int) -> list[int]:
        """The first ids, and the special ones at the end, `length` in all."""
        if len(ids) <= length:
            return ids
        closing = self._closing()
        return ids[: length - closing] + ids[len(ids) - closing :]

    def rows(self, ids: Sequence[list[int]]) -> Float32s:
        """(N, D) vectors of N lists of ids, padded to the longest and run at once."""
        longest = max(map(len, ids))
        padded = np.full((len(ids), longest), self.about.pad, np.int64)
        mask = np.zeros((len(ids), longest), np.int64)
        for n, one in enumerate(ids):
            padded[n, : len(one)] = one
            mask[n, : len(one)] = 1
        return self.run(padded, mask)

    def vectors(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> Float32s:
        """(N, D) vectors; the default prompt put in front, longer texts cut, like lengths run together."""
        prompt = self.about.prompts.get(self.about.default_prompt or "", "")
        ids = [self.cut(one, self.about.max_tokens) for one in self.tokens([prompt + text for text in texts])]
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
        out = np.zeros((len(ids), self.width), np.float32)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            out[some] = self.rows([ids[n] for n in some])
        return out

    def _closing(self) -> int:
        """How many special tokens end an input."""
        mask = self.tokenizer.encode("a").special_tokens_mask
        return len(mask) - 1 - max((n for n, special in enumerate(mask) if not special), default=len(mask) - 1)


def read_about(folder: Path) -> About:
    """`onnx.json`, with both files verified against it."""
    path = folder / ABOUT
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise FormatError(f"{path} is of format {content['format']!r}; this release reads format {FORMAT}")
        names = ("width", "max_tokens", "pad", "precision", "prompts", "default_prompt", "source")
        about = About(**{name: content[name] for name in names})
        files = {name: content["files"][name] for name in (MODEL, TOKENIZER)}
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise DamagedError(f"{path} cannot be read ({error}); export the model again") from error
    for name, recorded in files.items():
        if not (folder / name).is_file() or digest(folder / name) != recorded:
            raise DamagedError(f"{folder}/{name} is not what was exported (its digest differs); export the model again")
    return about


def _onnxruntime(path: Path, threads: int | None) -> Runner:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", f"the exported model {path.parent}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait take the processor from everybody else on it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        raise InputError(f"onnxruntime cannot run {path}: {str(error).splitlines()[0]}") from error

    def run(ids: Integers, mask: Integers) -> Float32s:
        found: Float32s = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return found

    return run


def _openvino(path: Path, threads: int | None) -> Runner:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino", "the OpenVINO backend") from error
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()

    def run(ids: Integers, mask: Integers) -> Float32s:
        found = request.infer({"input_ids": ids, "attention_mask": mask})
        return np.array(found[0], dtype=np.float32)

    return run
