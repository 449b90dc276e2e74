"""A sub-network as a model of its own: so many layers and dimensions, in a sentence-transformers folder."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from matryo.core.errors import InputError
from matryo.core.files import fsync_folder, storage_errors
from matryo.core.prefix import Nesting, check_width
from matryo.encoders import Model, load
from matryo.encoders.export import SAMPLE, TOLERANCE
from matryo.encoders.folder import fingerprint, write_card
from matryo.encoders.sentence_transformer import SentenceTransformerEncoder

ROUNDS = 5
"""Timed encodings by each of the two models, one after the other."""
TIMED = 32
"""Texts of one of them."""


def export_smaller(
    name: str | Path, out: Path, *, depth: int, width: int | None = None, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the first `depth` layers and `width` dimensions of a model as a sentence-transformers folder.

    The cut of the width is a linear layer at the end, and a normalisation, so that whatever loads the folder gets unit
    vectors of that width without being told.

    Args:
        name: a Matryo folder that was trained at several depths.
        out: a folder that does not exist yet. It appears whole or not at all.
        depth: one of the trained depths.
        width: d in 1..D, best one of the trained widths; all by default.
        texts: what the two models are timed on; by default some texts of several lengths.

    Returns:
        `depth`, `layers`, `width`, `bytes`, `difference` (largest, from the vectors of the model at that depth and
        width) and `speedup`: seconds of the whole model over seconds of this one, medians of interleaved runs.

    Raises:
        InputError: a depth that was not trained, a width outside 1..D, or `out` is there already.
    """
    if out.exists():
        raise InputError(f"{out} is there already; choose another folder or remove it first")
    model = load(name)
    width = check_width(model.width if width is None else width, model.width)
    low = model.at(depth)
    if not isinstance(low.encoder, SentenceTransformerEncoder) or model.depths is None:
        raise InputError(f"{name} has one depth only")
    made = _cut(low.encoder.model, width, model.width)
    card = _card(model, low, width, depth, {"name": str(name)} | fingerprint(str(name)))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(f"writing {out}"):
            temporary.mkdir(parents=True)
            _declare(made, card.nesting)
            made.save_pretrained(str(temporary), create_model_card=False)
            for weights in temporary.rglob("*.safetensors"):
                # safetensors lets only the owner read; a server is often someone else.
                weights.chmod((temporary / "modules.json").stat().st_mode)
            write_card(temporary, card)
            found = _compare(model, load(temporary), depth, width, list(texts) or list(SAMPLE))
            fsync_folder(temporary)
            os.rename(temporary, out)
            fsync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sizes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"depth": depth, "layers": model.depths[-1], "width": width, "bytes": sizes, **found}


def _cut(model: Any, width: int, full: int) -> Any:
    """The model with the cut as its last modules."""
    if width == full:
        return model
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    prefix = Dense(
        full, width, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.eye(full)[:width].clone()
    )
    return SentenceTransformer(
        modules=[*model.children(), prefix, Normalize()],
        device=str(model.device),
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
    )


def _card(model: Model, low: Model, width: int, depth: int, source: dict[str, str]) -> Any:
    nesting = model.nesting
    if nesting is not None:
        kept = [(d, weight) for d, weight in nesting if d < width]
        nesting = Nesting([*(d for d, _ in kept), width], [*(weight for _, weight in kept), 1.0])
    scores = tuple(row for row in low.card.scores if row["width"] <= width)
    training = {**model.card.training, "cut": {"depth": depth, "width": width, "source": source}}
    return replace(low.card, nesting=nesting, scores=scores, training=training)


def _declare(model: Any, nesting: Nesting | None) -> None:
    """The widths where vLLM and SGLang look."""
    if nesting is not None:
        config = model[0].auto_model.config
        config.is_matryoshka, config.matryoshka_dimensions = True, list(nesting.widths)


def _compare(model: Model, made: Model, depth: int, width: int, texts: list[str]) -> dict[str, float]:
    """The largest difference from the model at that depth and width, and how much quicker it is than the whole one."""
    own, theirs = made.encode(texts), model.encode(texts, width=width, depth=depth)
    difference = float(np.abs(own - theirs).max())
    if not difference <= TOLERANCE:
        raise InputError(
            f"the exported vectors differ from the model's by {difference:.1e} where {TOLERANCE} is allowed; is part "
            "of the model kept outside its modules?"
        )
    timed = (texts * -(-TIMED // len(texts)))[:TIMED]
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(ROUNDS):
        for place, one in enumerate((model, made)):
            began = time.perf_counter()
            one.encode(timed)
            seconds[place].append(time.perf_counter() - began)
    return {"difference": difference, "speedup": median(seconds[0]) / median(seconds[1])}
