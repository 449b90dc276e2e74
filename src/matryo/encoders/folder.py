"""The model folder: a sentence-transformers folder, plus what only Matryo knows in `matryo.json`.

Format 1 holds the nesting, the depths, the order of steps from vector to prefix, the score of each width and code, and
how the model was trained; int8 scales per width lie beside it in `matryo.safetensors`.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from matryo.core.errors import DamagedError, FormatError, InputError
from matryo.core.files import digest, storage_errors, write_atomically, write_text
from matryo.core.prefix import Nesting
from matryo.encoders.model import Card

FORMAT = 1
CARD, SCALES, IMAGE = "matryo.json", "matryo.safetensors", "image.json"
STEPS = ["encode at full width", "truncate", "normalize"]
"""The order that gives a prefix. A model that needs a full-width transform first would say so between the first two."""

TRUSTED = "sentence_transformers."


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """`storage_errors` that also knows a refusal by safetensors or tokenizers, whose errors are not OSErrors."""
    with storage_errors(what):
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) or "(os error " not in str(error):
                raise
            raise OSError(str(error)) from error


def write_card(folder: Path, card: Card) -> None:
    """Write `matryo.json` (last, so that its presence means a whole card) and the int8 scales into a model folder."""
    if card.int8_scales:
        scales = {f"int8/{width}": np.ascontiguousarray(scale) for width, scale in card.int8_scales.items()}
        # Not by safetensors itself, whose files only their owner may read.
        write_atomically(folder / SCALES, lambda path: _write(path, save(scales)))
    content = {
        "format": FORMAT,
        "name": card.name,
        "nesting": card.nesting and {"widths": list(card.nesting.widths), "weights": list(card.nesting.weights)},
        "depths": card.depths and list(card.depths),
        "steps": STEPS,
        "scores": list(card.scores),
        **({"depth_scores": list(card.depth_scores)} if card.depth_scores else {}),
        "training": card.training,
    }
    write_text(folder / CARD, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def read_card(folder: Path) -> Card:
    """The card of a model folder; a folder without `matryo.json` is a model that was not trained nested."""
    path = folder / CARD
    if not path.is_file():
        return Card(str(folder), nesting=_declared_widths(folder))
    try:
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise FormatError(
                f"{path} is of format {content.get('format')!r}; this release reads format {FORMAT}. "
                "Use the release that wrote it, or train again"
            )
        if content["steps"] != STEPS:
            raise FormatError(f"{path} asks for steps {content['steps']}; this release knows {STEPS}")
        nesting = content["nesting"] and Nesting(content["nesting"]["widths"], content["nesting"]["weights"])
        scales = load_file(folder / SCALES) if (folder / SCALES).is_file() else {}
        return Card(
            name=str(folder),
            nesting=nesting,
            depths=content["depths"] and tuple(content["depths"]),
            scores=tuple(content["scores"]),
            depth_scores=tuple(content.get("depth_scores", ())),
            int8_scales={int(key.removeprefix("int8/")): value for key, value in scales.items()},
            training=content["training"],
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError, OSError) as error:
        raise DamagedError(f"{path} cannot be read ({error}); restore the folder from a copy") from error


def _declared_widths(folder: Path) -> Nesting | None:
    """The widths a foreign model declares in `config.json`, the keys that vLLM and SGLang read."""
    config = _json(folder / "config.json")
    widths = config.get("matryoshka_dimensions") if isinstance(config, dict) else None
    if not isinstance(widths, list) or not widths:
        return None
    if not all(isinstance(width, int) for width in widths):
        raise DamagedError(f"{folder}/config.json: matryoshka_dimensions must be whole numbers, got {widths}")
    return Nesting(sorted(set(widths)))


def module_types(folder: Path) -> list[str]:
    """The module classes a sentence-transformers folder names, refusing any that are not that package's own.

    Loading a class named by a file runs that class's code, so a folder may only name modules of sentence-transformers,
    and its weights must be safetensors.
    """
    modules = _json(folder / "modules.json")
    if modules is None:
        raise InputError(f"{folder} is not a model folder: it has no modules.json")
    listed = isinstance(modules, list) and all(isinstance(module, dict) for module in modules)
    types = [str(module.get("type", "")) for module in modules] if listed else []
    for name in types or [""]:
        if not name.startswith(TRUSTED):
            raise InputError(
                f"{folder}/modules.json names the class {name!r}; only sentence-transformers' own are loaded"
            )
    places = [folder / str(module.get("path", "")) for module in modules]
    for place in places:
        if not place.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{folder}/modules.json names a module outside its folder: {place}")
    pickled = [p for p in places if any(p.glob("pytorch_model*.bin")) and not any(p.glob("model*.safetensors"))]
    if pickled or not any(path.name not in (SCALES,) for path in folder.rglob("*.safetensors")):
        where = pickled[0] if pickled else folder
        raise InputError(f"{where} holds no safetensors weights; pickled weights are never loaded, convert them first")
    if any("auto_map" in (_json(path) or {}) for path in folder.rglob("config.json")):
        raise InputError(f"{folder} asks for remote code (auto_map in config.json); it is never run")
    return types


def module_folder(folder: Path) -> Path:
    """Where the first module's files lie: the folder itself, or the folder inside it that `modules.json` names."""
    return folder / str(_json(folder / "modules.json")[0].get("path", ""))


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON ({error})") from error


def fingerprint(name: str) -> dict[str, str]:
    """A digest of everything in a model folder that decides its vectors; nothing for a model known by name alone.

    An export at full precision has the digest of the model it came from, as it gives the same vectors.
    """
    folder = Path(name)
    if not folder.is_dir():
        return {}
    exported = _json(folder / "onnx.json") or {}
    if exported.get("precision") == "fp32" and "blake2b" in exported.get("source", {}):
        return {"blake2b": str(exported["source"]["blake2b"])}
    whole = hashlib.blake2b(digest_size=16)
    kinds = (".safetensors", ".json", ".txt", ".model")
    for path in sorted(p for p in folder.rglob("*") if p.suffix in kinds and "checkpoints" not in p.parts):
        if path.name not in (CARD, SCALES):
            whole.update(f"{path.relative_to(folder)} {digest(path)}\n".encode())
    return {"blake2b": whole.hexdigest()}
