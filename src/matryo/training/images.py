"""Training of image encoders: labelled pictures in, model folder out.

A loop of its own and not the text trainer's: pictures are one uint8 array, so a batch is a slice of it, and there is
nothing to collate or to tokenise. Everything random of an epoch is drawn from (seed, epoch), and a checkpoint is
written after each epoch; a resumed run is therefore bit-equal to one that was never stopped.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from matryo.core.errors import DamagedError, InputError
from matryo.core.files import write_atomically
from matryo.core.prefix import Nesting
from matryo.encoders import load
from matryo.encoders.folder import CARD, IMAGE, write_card
from matryo.encoders.images.augment import crop_and_flip
from matryo.encoders.images.encoder import ImageEncoder
from matryo.encoders.images.network import Network, NetworkConfig, pretrained
from matryo.encoders.images.pictures import Pictures
from matryo.encoders.model import Card, Model
from matryo.losses import NestedHead, nested_cross_entropy, nested_multi_similarity, nested_supcon
from matryo.training.heads import save_heads

STATE = "state.safetensors"
CONTRAST: dict[str, Any] = {"supcon": nested_supcon, "multi_similarity": nested_multi_similarity}
Loss = Literal["cross_entropy", "supcon", "multi_similarity"]


@dataclass(frozen=True)
class ImageConfig:
    """One training run on labelled pictures."""

    out: Path
    """Model folder to write; the checkpoint lies inside it until the run ends."""
    network: NetworkConfig
    base: str | None = None
    """Folder or hub name of transformers, or an image model's folder, whose weights to start from."""
    widths: tuple[int, ...] | None = None
    """Widths to train; 8 doubling to D if unset."""
    loss: Loss = "cross_entropy"
    tied: bool = False
    """One head for all widths (MRL-E) in place of one for each (MRL)."""
    label_smoothing: float = 0.0
    epochs: int = 10
    batch_size: int = 128
    per_class: int = 4
    """Pictures of a class in a batch of a contrastive loss."""
    learning_rate: float = 0.1
    warmup: float = 0.2
    """Share of all steps in which the rate rises; then it falls to 0."""
    weight_decay: float = 5e-4
    padding: int = 4
    flip: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss != "cross_entropy" and self.loss not in CONTRAST:
            raise InputError(f"loss must be cross_entropy, {' or '.join(CONTRAST)} for pictures, got {self.loss!r}")
        if self.epochs < 1 or self.batch_size < 2 or self.per_class < 2:
            raise InputError("epochs must be at least 1, batch_size and per_class at least 2")
        if not (self.learning_rate > 0 and 0 <= self.warmup < 1 and self.weight_decay >= 0):
            raise InputError("learning_rate must be above 0, warmup in 0..1 and weight_decay not below 0")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        if self.tied and self.loss != "cross_entropy":
            raise InputError(f"tied is for the heads of cross_entropy; {self.loss} has none")

    def identity(self) -> str:
        """What a checkpoint has to agree with."""
        said = {**asdict(self), "network": self.network.plain()}
        del said["out"]
        return json.dumps(said, sort_keys=True)


@dataclass(frozen=True)
class Epoch:
    """What a report says after each epoch."""

    epoch: int
    epochs: int
    losses: dict[int, float]
    """Mean unweighted loss of each width."""
    seconds: float


def train_images(
    config: ImageConfig, pictures: Pictures, *, resume: bool = False, report: Callable[[Epoch], None] | None = None
) -> Model:
    """Train a nested image encoder (arXiv 2205.13147, equation 1) and write it to `config.out`.

    Args:
        config: what to train.
        pictures: N labelled pictures of `config.network.size` pixels.
        resume: go on from the checkpoint in `config.out`; a finished run is simply loaded.
        report: called after every epoch.

    Raises:
        InputError: pictures without labels or of another size, no class with two pictures for a contrastive loss, or an
            `out` that does not fit.
        DamagedError: the checkpoint cannot be read.
    """
    if (config.out / CARD).is_file():
        if not resume:
            raise InputError(f"{config.out} already holds a trained model; choose another folder or remove it")
        return load(config.out)
    run = Run(config, pictures)
    if (config.out / STATE).is_file():
        if not resume:
            raise InputError(f"{config.out} holds an unfinished run; go on with resume or choose another folder")
        run.restore()
    config.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(run.done, config.epochs):
        said = run.epoch(epoch)
        run.done = epoch + 1
        run.keep()
        if report is not None:
            report(said)
    return run.finish()


def starting(base: str, config: NetworkConfig) -> Network:
    """A network of this configuration around the weights of `base`; its projection is new unless `base` has the same.

    Raises:
        InputError: `base` cannot be loaded, or its backbone is not that of `config`.
    """
    if (Path(base) / IMAGE).is_file():
        found = ImageEncoder.load(base).network
        network = found if found.config.width == config.width else Network(config, found.backbone)
    else:
        network = pretrained(base, config.width, config.size, config.pooling)
    if network.config.backbone != config.backbone:
        raise InputError(f"the backbone of {base} is not the one that the configuration describes; take its own")
    return network


class Run:
    """A network in training: what it consists of, a step, an epoch, its checkpoint."""

    def __init__(self, config: ImageConfig, pictures: Pictures) -> None:
        self.config, self.pictures = config, pictures
        self.labels_N = _check(config, pictures)
        # A local generator would not reach the initialisers of transformers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            made: Any = Network(config.network) if config.base is None else starting(config.base, config.network)
            self.network: Network = made.to(memory_format=torch.channels_last)
            D = self.network.width
            self.nesting = Nesting.doubling(min(8, D), D) if config.widths is None else Nesting(config.widths)
            self.nesting.check(D)
            self.head: NestedHead | None = None
            if config.loss == "cross_entropy":
                self.head = NestedHead(self.nesting, len(pictures.classes), tied=config.tied)
        self.optimizer = self._optimizer()
        self.done = 0

    @property
    def parts(self) -> nn.ModuleDict:
        """What is trained."""
        return nn.ModuleDict({"network": self.network} | ({"head": self.head} if self.head is not None else {}))

    def epoch(self, epoch: int) -> Epoch:
        """Every picture once (by classes for a contrastive loss)."""
        config, began = self.config, time.perf_counter()
        rng = np.random.default_rng([config.seed, epoch])
        sums, steps = torch.zeros(len(self.nesting)), 0
        total = self.steps_per_epoch * config.epochs
        self.network.train()
        for rows in self._batches(rng):
            step = epoch * self.steps_per_epoch + steps
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * one_cycle(step / total, config.warmup)
            pixels = crop_and_flip(self.pictures.pixels[rows], rng, config.padding, config.flip)
            sums += self.step(torch.from_numpy(pixels), torch.from_numpy(self.labels_N[rows]))
            steps += 1
        means = (sums / steps).tolist()
        losses = dict(zip(self.nesting.widths, means, strict=True))
        return Epoch(epoch + 1, config.epochs, losses, time.perf_counter() - began)

    def step(self, pixels_BHWC: Tensor, labels_B: Tensor) -> Tensor:
        """One step; the (L,) loss of each width."""
        half = self.config.precision == "bfloat16"
        self.optimizer.zero_grad()
        with torch.autocast(pixels_BHWC.device.type, torch.bfloat16, enabled=half):
            features = self.network(pixels_BHWC)
        options: dict[str, Any] = {"nesting": self.nesting, "per_width": True}
        if self.head is not None:
            smoothing = self.config.label_smoothing
            total, values = nested_cross_entropy(features, labels_B, self.head, label_smoothing=smoothing, **options)
        else:
            total, values = CONTRAST[self.config.loss](features, labels_B, **options)
        total.backward()
        self.optimizer.step()
        found: Tensor = values
        return found

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only; a single short one if there are fewer pictures."""
        return max(1, len(self.pictures) // self.config.batch_size)

    def _batches(self, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        size = self.config.batch_size
        if self.head is not None:
            order = rng.permutation(len(self.pictures))
        else:
            order = by_class(self.labels_N, self.config.per_class, rng)
        for start in range(0, self.steps_per_epoch * size, size):
            yield order[start : start + size]

    def _optimizer(self) -> torch.optim.Optimizer:
        weights = [p for p in self.parts.parameters() if p.ndim > 1]
        others = [p for p in self.parts.parameters() if p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, self.config.learning_rate, momentum=0.9, nesterov=True)

    def keep(self) -> None:
        """Write the checkpoint: weights and momentum, whole or not at all."""
        tensors = {f"parts/{k}": v.detach().contiguous() for k, v in self.parts.state_dict().items()}
        for n, state in self.optimizer.state_dict()["state"].items():
            tensors[f"momentum/{n}"] = state["momentum_buffer"].contiguous()
        said = {"done": str(self.done), "identity": self.config.identity()}
        write_atomically(self.config.out / STATE, lambda path: save_file(tensors, path, said))

    def restore(self) -> None:
        """Go on from the checkpoint."""
        path = self.config.out / STATE
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata()
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{path} cannot be read ({error}); remove it and start again") from error
        if said["identity"] != self.config.identity():
            raise InputError(f"{self.config.out} holds a run of another configuration; choose another folder")
        parts = {k.removeprefix("parts/"): v for k, v in tensors.items() if k.startswith("parts/")}
        self.parts.load_state_dict(parts)
        whole = self.optimizer.state_dict()
        whole["state"] = {
            int(k.removeprefix("momentum/")): {"momentum_buffer": v}
            for k, v in tensors.items()
            if k.startswith("momentum/")
        }
        self.optimizer.load_state_dict(whole)
        self.done = int(said["done"])

    def finish(self) -> Model:
        """Write the model folder; the card comes last."""
        config = self.config
        encoder = ImageEncoder(self.network)
        encoder.save(config.out)
        training: dict[str, Any] = {"config": json.loads(config.identity()), "pictures": len(self.pictures)}
        if self.head is not None:
            save_heads(config.out, {"pictures": self.head})
            training["classes"] = {"pictures": list(self.pictures.classes)}
            training["heads"] = {"pictures": {"tied": config.tied, "normalize": False}}
        card = Card(str(config.out), self.nesting, training=training)
        write_card(config.out, card)
        (config.out / STATE).unlink(missing_ok=True)
        return Model(encoder, card)


def one_cycle(share: float, warmup: float) -> float:
    """The rate, as a share of its peak, after this share of all steps: up along a line, down along half a cosine."""
    if share < warmup:
        return (share + 0.01) / (warmup + 0.01)
    return 0.5 + 0.5 * math.cos(math.pi * (share - warmup) / (1 - warmup))


def by_class(labels_N: NDArray[np.int64], per_class: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """An order of all rows in which those of a class come in runs of `per_class` (shorter at the end of a class)."""
    runs: list[NDArray[np.int64]] = []
    for label in np.unique(labels_N):
        rows = rng.permutation(np.flatnonzero(labels_N == label))
        runs.extend(rows[start : start + per_class] for start in range(0, len(rows), per_class))
    # Runs of one have no partner beside them; they come last, where whole batches leave them out first.
    runs.sort(key=lambda run: len(run) == 1)
    alone = sum(len(run) == 1 for run in runs)
    paired = len(runs) - alone
    order = [*(int(n) for n in rng.permutation(paired)), *range(paired, len(runs))]
    return np.concatenate([runs[n] for n in order])


def _check(config: ImageConfig, pictures: Pictures) -> NDArray[np.int64]:
    size = config.network.size
    if pictures.pixels.shape[1:] != (size, size, 3):
        raise InputError(f"the network takes pictures of {size} pixels, got {pictures.pixels.shape[1:3]}")
    if pictures.labels is None:
        raise InputError("the pictures have no labels; put them into class folders, or give a column 'label'")
    if len(pictures) < 2:
        raise InputError("one picture is nothing to train on; give at least 2")
    if config.loss != "cross_entropy" and np.bincount(pictures.labels).max() < 2:
        raise InputError(
            f"loss {config.loss} needs a class of two pictures, and every class has one; use cross_entropy"
        )
    return pictures.labels
