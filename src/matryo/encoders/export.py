"""Exporting a sentence-transformers model to a folder that runs without torch. Needs the `train` and `onnx` extras."""

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.files import digest, fsync_folder, storage_errors, write_text
from matryo.core.prefix import truncate
from matryo.encoders import load
from matryo.encoders.folder import CARD, SCALES, fingerprint
from matryo.encoders.onnx import ABOUT, FORMAT, MODEL, TOKENIZER, OnnxEncoder
from matryo.encoders.sentence_transformer import SentenceTransformerEncoder

Float32s = NDArray[np.float32]

TOLERANCE = 1e-5
"""Largest difference of any number of a unit vector that an export may make."""
SAMPLE = (
    "A short text.",
    "Two dogs run through the snow while a third one watches them from under the old wooden porch of the house.",
    "naïve café 漢字 42 + 3.14 = x_y; e-mail@example.org",
    "word " * 400,
)
OPSET = 17


def export_onnx(
    name: str | Path, out: Path, *, int8: bool = False, texts: Sequence[str] = (), floor: float = 0.9
) -> dict[str, Any]:
    """Write a model as `model.onnx` with its tokeniser, and check that it gives the same vectors.

    Args:
        name: a sentence-transformers folder or hub name.
        out: a folder that does not exist yet. It appears whole or not at all.
        int8: quantise the weights, per channel. Where neighbours change too much at the smallest trained width, the
            products that narrow stay float32, as few as do, the first layers' first; refused if all are too few.
        texts: what to judge int8 by: texts like those to be served, a few hundred.
        floor: for int8, the least mean share of each text's 10 nearest neighbours that must stay.

    Returns:
        What was measured: `difference` (largest, of unit vectors), `bytes`, and for int8 `overlap`, `width` and
        `float32_products`, how many were left.

    Raises:
        InputError: the model is static already, cannot be exported as it is, or its export differs.
    """
    _refuse(out, int8, texts)
    model = load(name)
    if not isinstance(model.encoder, SentenceTransformerEncoder):
        raise InputError(
            f"{name} runs without torch as it is; only transformers are exported for a server. For a small "
            "device, cut it to one width: --out FOLDER --width N"
        )
    inner = model.encoder.model
    if not getattr(inner.tokenizer, "is_fast", False):
        raise InputError(f"{name} has no fast tokeniser, which an export needs")
    if any(not getattr(module, "include_prompt", True) for module in inner):
        raise InputError(f"{name} leaves its prompt out of the mean; such a model is served with --backend torch")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(f"writing {out}"):
            temporary.mkdir(parents=True)
            _trace(inner, temporary / MODEL)
            (temporary / TOKENIZER).write_text(inner.tokenizer.backend_tokenizer.to_str())
            about = {
                "format": FORMAT,
                "width": model.width,
                "max_tokens": int(inner.max_seq_length),
                "pad": int(inner.tokenizer.pad_token_id or 0),
                "precision": "fp32",
                "prompts": dict(inner.prompts),
                "default_prompt": inner.default_prompt_name,
                "source": {"name": str(name)} | fingerprint(str(name)),
            }
            _describe(temporary, about, Path(name), model)
            plain = OnnxEncoder.load(temporary)
            found = {"difference": _difference(model.encoder, plain), "precision": "fp32"}
            if int8:
                widths = model.nesting.widths if model.nesting else (model.width,)
                found |= _quantise(temporary, plain, texts, widths[0], floor)
            fsync_folder(temporary)
            os.rename(temporary, out)
            fsync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found | {"bytes": sum(path.stat().st_size for path in out.iterdir())}


def _refuse(out: Path, int8: bool, texts: Sequence[str]) -> None:
    if out.exists():
        raise InputError(f"{out} is there already; choose another folder or remove it first")
    if int8 and len(texts) < 100:
        raise InputError(
            f"int8 is judged by texts like those to be served: give at least 100 (--texts), got {len(texts)}"
        )
    for package in ("onnxruntime", "onnx") if int8 else ("onnxruntime",):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, "onnx", "exporting") from error


def _trace(inner: Any, path: Path) -> None:
    """The graph of the whole model, pooling and normalising included.

    Traced by torch's older exporter: the newer one needs one more package and gives the same operators.
    """
    import torch

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            features = {"input_ids": input_ids, "attention_mask": attention_mask}
            return self.inner(features)["sentence_embedding"]

    inner.eval()
    given = inner.tokenizer(list(SAMPLE[:2]), padding=True, return_tensors="pt").to(inner.device)
    free = {0: "inputs", 1: "tokens"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Whole(),
            (given["input_ids"], given["attention_mask"]),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["vectors"],
            dynamic_axes={"input_ids": free, "attention_mask": free, "vectors": {0: "inputs"}},
            opset_version=OPSET,
            dynamo=False,
        )


def _describe(folder: Path, about: dict[str, Any], source: Path, model: Any) -> None:
    """`onnx.json`, the card, and the keys of `config.json` that vLLM and SGLang read."""
    files = {name: digest(folder / name) for name in (MODEL, TOKENIZER)}
    write_text(folder / ABOUT, json.dumps(about | {"files": files}, indent=2, ensure_ascii=False) + "\n")
    for name in (CARD, SCALES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text()) if (source / "config.json").is_file() else {}
    if model.nesting is not None:
        config |= {"is_matryoshka": True, "matryoshka_dimensions": list(model.nesting.widths)}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _difference(before: Any, after: OnnxEncoder) -> float:
    """Largest difference over texts of several lengths and scripts, one by one and in one batch."""
    texts = list(SAMPLE)
    expected = truncate(before.vectors(texts, 1, False), before.width)
    together = truncate(after.vectors(texts), after.width)
    alone = truncate(np.concatenate([after.vectors([text]) for text in texts]), after.width)
    most = float(max(np.abs(together - expected).max(), np.abs(alone - expected).max()))
    if not most <= TOLERANCE:
        raise InputError(
            f"the export's vectors differ from the model's by {most:.1e} where {TOLERANCE} is allowed; serve it with "
            "--backend torch"
        )
    return most


def _quantise(folder: Path, plain: OnnxEncoder, texts: Sequence[str], width: int, floor: float) -> dict[str, Any]:
    """Put integer products in the place of the others, if the neighbours of texts stay at the narrowest width."""
    from matryo.encoders.int8 import quantise_enough

    texts, traced = list(texts), folder / f"fp32.{MODEL}"
    expected = truncate(plain.vectors(texts), width)
    os.replace(folder / MODEL, traced)

    def kept() -> float:
        return overlap(expected, truncate(plain.with_graph(folder / MODEL).vectors(texts), width))

    share, left = quantise_enough(traced, folder / MODEL, kept, floor, width)
    traced.unlink()
    about = json.loads((folder / ABOUT).read_text()) | {"precision": "int8", "float32_products": left}
    about["files"][MODEL] = digest(folder / MODEL)
    write_text(folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return {"precision": "int8", "overlap": share, "width": width, "float32_products": left}


def overlap(one_ND: Float32s, other_ND: Float32s, k: int = 10) -> float:
    """Mean share of each row's k nearest rows (itself aside) that are the same in both sets of unit vectors."""
    shares = []
    for n in range(len(one_ND)):
        found = []
        for rows in (one_ND, other_ND):
            scores = rows @ rows[n]
            scores[n] = -np.inf
            found.append(set(np.argsort(-scores, kind="stable")[:k].tolist()))
        shares.append(len(found[0] & found[1]) / k)
    return float(np.mean(shares))
