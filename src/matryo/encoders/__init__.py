"""Encoders: texts or pictures in, full-width vectors out; `load` finds the right one for a name."""

from dataclasses import replace
from pathlib import Path

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.encoders.model import Card, Encoder, Model

__all__ = ["Card", "Encoder", "Model", "load", "model_of"]


def load(name: str | Path, device: str | None = None) -> Model:
    """Load a model by name.

    Args:
        name: a Matryo model folder, any sentence-transformers folder or hub name, an export to ONNX, or "toy". Static
            models and exports load without torch; anything else needs the `train` extra.
        device: where torch runs it ("cpu", "cuda", ...); torch's choice by default.

    Raises:
        InputError: no such model, or one that asks for remote code, foreign classes or pickled weights.
        FormatError, DamagedError: a Matryo folder of another format, or unreadable.
    """
    text = str(name)
    if text == "toy":
        from matryo.encoders.toy import ToyEncoder

        return Model(ToyEncoder(), Card("toy", Nesting.doubling(8, 64)))
    folder = Path(name)
    if folder.is_dir():
        from matryo.encoders.folder import IMAGE, module_folder, module_types, read_card

        if (folder / "onnx.json").is_file():
            from matryo.encoders.onnx import OnnxEncoder

            return model_of(OnnxEncoder.load(folder), read_card(folder), folder)
        if (folder / IMAGE).is_file():
            from matryo.encoders.images.encoder import ImageEncoder

            return model_of(ImageEncoder.load(folder, device), read_card(folder), folder)
        types = module_types(folder)
        card = read_card(folder)
        if len(types) == 1 and types[0].endswith(".StaticEmbedding"):
            from matryo.encoders.static import StaticEncoder

            return model_of(StaticEncoder.load(module_folder(folder)), card, folder)
    elif isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(f"no such model folder: {name}")
    else:
        card = Card(text)
    from matryo.encoders.sentence_transformer import SentenceTransformerEncoder

    return model_of(SentenceTransformerEncoder.load(text, device), card, folder)


def model_of(encoder: Encoder, card: Card, folder: Path) -> Model:
    """A model; widths that a foreign folder merely declares often leave out the full one, which is added."""
    if card.nesting is not None and not (folder / "matryo.json").is_file():
        inside = [width for width in card.nesting.widths if width < encoder.width]
        card = replace(card, nesting=Nesting([*inside, encoder.width]))
    return Model(encoder, card)
