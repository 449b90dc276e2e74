"""Two towers, pictures and texts, with one nested space; each is written as a model folder of its own."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.core.records import check_texts
from matryo.encoders import load
from matryo.encoders.folder import CARD, write_card
from matryo.encoders.images.augment import crop_and_flip
from matryo.encoders.images.encoder import ImageEncoder
from matryo.encoders.images.network import Network, NetworkConfig
from matryo.encoders.images.pictures import Pictures
from matryo.encoders.model import Card, Model
from matryo.encoders.sentence_transformer import SentenceTransformerEncoder
from matryo.losses import nested_info_nce, nested_sigmoid
from matryo.training.config import StaticConfig
from matryo.training.images import Epoch, one_cycle, starting
from matryo.training.static import new_static


@dataclass(frozen=True)
class TowerConfig:
    """One training run on pictures and their texts."""

    out: Path
    """Folder to write: the model folders `image` and `text` in it."""
    network: NetworkConfig
    base: str | None = None
    """Weights the image tower starts from, as in `ImageConfig`."""
    text: str | None = None
    """Folder or hub name of the text tower, of D dimensions; a new static one if unset."""
    widths: tuple[int, ...] | None = None
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    """`nested_info_nce` both ways, or `nested_sigmoid`."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    epochs: int = 20
    batch_size: int = 256
    image_rate: float = 1e-3
    text_rate: float | None = None
    """Peak rate of the text tower: 0.02 for a static one, 2e-5 for others if unset."""
    warmup: float = 0.1
    weight_decay: float = 0.0
    padding: int = 4
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in ("info_nce", "sigmoid"):
            raise InputError(f"loss must be info_nce or sigmoid for two towers, got {self.loss!r}")
        if self.epochs < 1 or self.batch_size < 2:
            raise InputError("epochs must be at least 1 and batch_size at least 2")


@dataclass(frozen=True)
class Towers:
    """Two models with one space: the cosine of a picture's and a text's prefix says how well they fit."""

    image: Model
    text: Model


def load_towers(folder: str | Path) -> Towers:
    """The towers of a folder that `train_towers` wrote."""
    return Towers(load(Path(folder) / "image"), load(Path(folder) / "text"))


def train_towers(
    config: TowerConfig, pictures: Pictures, texts: Sequence[str], report: Callable[[Epoch], None] | None = None
) -> Towers:
    """Train an image and a text tower together; the i-th picture belongs to the i-th text.

    Every other text of a batch is a negative, except one that is equal to the picture's own. Not resumable: nothing is
    written before the end.

    Raises:
        InputError: not one text a picture, a blank text, pictures of another size, towers of different widths, or an
            `out` that already holds towers.
    """
    checked = _check(config, pictures, texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        image = Network(config.network) if config.base is None else starting(config.base, config.network)
        text = _text_tower(config, image.width, checked)
    D = image.width
    nesting = Nesting.doubling(min(8, D), D) if config.widths is None else Nesting(config.widths)
    nesting.check(D)
    _, numbers = np.unique(np.array(checked, dtype=object), return_inverse=True)
    run = _Run(config, nesting, pictures, checked, torch.from_numpy(numbers), image, text)
    for epoch in range(config.epochs):
        said = run.epoch(epoch)
        if report is not None:
            report(said)
    return _write(config, nesting, image, text, len(pictures))


@dataclass
class _Run:
    config: TowerConfig
    nesting: Nesting
    pictures: Pictures
    texts: list[str]
    numbers: torch.Tensor
    """(N,) equal for equal texts."""
    image: Network
    text: SentenceTransformer

    def __post_init__(self) -> None:
        text: nn.Module = self.text
        rate = self.config.text_rate or (0.02 if hasattr(self.text[0], "embedding") else 2e-5)
        groups = [
            {"params": list(self.image.parameters()), "lr": self.config.image_rate},
            {"params": list(text.parameters()), "lr": rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.config.weight_decay)
        self.peaks = [self.config.image_rate, rate]
        self.steps = max(1, len(self.texts) // self.config.batch_size)

    def epoch(self, epoch: int) -> Epoch:
        began, config = time.perf_counter(), self.config
        rng = np.random.default_rng([config.seed, epoch])
        order = rng.permutation(len(self.texts))
        sums = torch.zeros(len(self.nesting))
        self.image.train()
        self.text.train()
        for step in range(self.steps):
            share = (epoch * self.steps + step) / (config.epochs * self.steps)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * one_cycle(share, config.warmup)
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            pixels = crop_and_flip(self.pictures.pixels[rows], rng, config.padding, config.flip)
            sums += self.step(torch.from_numpy(pixels), rows)
        losses = dict(zip(self.nesting.widths, (sums / self.steps).tolist(), strict=True))
        return Epoch(epoch + 1, config.epochs, losses, time.perf_counter() - began)

    def step(self, pixels_BHWC: torch.Tensor, rows: "np.ndarray[Any, np.dtype[np.int64]]") -> torch.Tensor:
        """One step; the (L,) loss of each width."""
        self.optimizer.zero_grad()
        images_BD = self.image(pixels_BHWC)
        features = self.text.preprocess([self.texts[row] for row in rows])
        texts_BD = self.text(features)["sentence_embedding"]
        own = self.numbers[torch.from_numpy(rows)]
        same_BB = (own[:, None] == own[None, :]) & ~torch.eye(len(own), dtype=torch.bool)
        options: dict[str, Any] = {
            "nesting": self.nesting,
            "per_width": True,
            "ignore": same_BB,
            **self.config.loss_args,
        }
        if self.config.loss == "info_nce":
            total, values = nested_info_nce(images_BD, texts_BD, symmetric=True, **options)
        else:
            total, values = nested_sigmoid(images_BD, texts_BD, **options)
        total.backward()
        self.optimizer.step()
        found: torch.Tensor = values
        return found


def _check(config: TowerConfig, pictures: Pictures, texts: Sequence[str]) -> list[str]:
    checked = check_texts(texts, "texts")
    size = config.network.size
    if len(checked) != len(pictures):
        raise InputError(f"each picture needs its text: got {len(pictures)} pictures and {len(checked)} texts")
    if len(checked) < 2:
        raise InputError("one pair is nothing to contrast; give at least 2")
    if pictures.pixels.shape[1:] != (size, size, 3):
        raise InputError(f"the network takes pictures of {size} pixels, got {pictures.pixels.shape[1:3]}")
    if any((config.out / tower / CARD).is_file() for tower in ("image", "text")):
        raise InputError(f"{config.out} already holds towers; choose another folder or remove it")
    return checked


def _text_tower(config: TowerConfig, width: int, texts: list[str]) -> SentenceTransformer:
    if config.text is None:
        return new_static(StaticConfig(width=width), texts, config.seed)
    model: SentenceTransformer = SentenceTransformerEncoder.load(config.text, "cpu").model
    found = model.get_embedding_dimension()
    if found != width:
        raise InputError(f"the text tower {config.text} has {found} dimensions, the image tower {width}; set its width")
    return model


def _write(config: TowerConfig, nesting: Nesting, image: Network, text: SentenceTransformer, pairs: int) -> Towers:
    said = {**asdict(config), "network": config.network.plain()}
    del said["out"]
    training = {"towers": json.loads(json.dumps(said)), "pairs": pairs}
    ImageEncoder(image).save(config.out / "image")
    text.eval().save_pretrained(str(config.out / "text"), create_model_card=False)
    for tower in ("text", "image"):
        write_card(config.out / tower, Card(tower, nesting, training=training))
    return load_towers(config.out)
