"""The network of an image encoder: a backbone of transformers, a pooling, a projection to D."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from matryo.core.errors import InputError, MissingExtraError

Pooling = Literal["avg", "max", "gem", "cls"]
POOLINGS = ("avg", "max", "gem", "cls")
Stem = Literal["built", "half", "small"]
STEMS = ("built", "half", "small")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class NetworkConfig:
    """What an image encoder is built from.

    `backbone` is a configuration of transformers: `model_type` (resnet, convnext, vit, dinov2, ...) and its fields.
    `stem` is for a ResNet of small pictures: "small" replaces the 7x7 convolution of stride 2 and the max-pool by a 3x3
    convolution of stride 1, "half" by one of stride 2.
    """

    backbone: dict[str, Any]
    width: int | None = None
    """D of a linear projection; None leaves the backbone's own width and no projection."""
    size: int = 32
    pooling: Pooling = "avg"
    stem: Stem = "built"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.stem not in STEMS:
            raise InputError(f"stem must be one of {', '.join(STEMS)}, got {self.stem!r}")
        if "model_type" not in self.backbone:
            raise InputError("backbone needs model_type, the name transformers has for the family, such as resnet")
        if self.stem != "built" and self.backbone["model_type"] != "resnet":
            raise InputError(f"stem {self.stem!r} is for resnet, not for {self.backbone['model_type']}")
        if self.width is not None and self.width < 1:
            raise InputError(f"width must be at least 1, got {self.width}")

    def plain(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "NetworkConfig":
        """From `plain`."""
        return cls(**{**content, "mean": tuple(content["mean"]), "std": tuple(content["std"])})


class Network(nn.Module):
    """uint8 pictures (B, H, W, 3) to vectors (B, D)."""

    def __init__(self, config: NetworkConfig, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = build(config) if backbone is None else backbone
        inner = features_of(self.backbone)
        self.projection = nn.Identity() if config.width is None else nn.Linear(inner, config.width)
        self.width = inner if config.width is None else config.width
        self.power = nn.Parameter(torch.tensor(3.0)) if config.pooling == "gem" else None
        scale = 1 / (255 * torch.tensor(config.std))
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        offset = torch.tensor(config.mean) / torch.tensor(config.std)
        self.register_buffer("offset", offset.view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        """(B, D) vectors, raw lengths; pixels are normalised here, in the batch."""
        x: Any = pixels_BHWC.permute(0, 3, 1, 2).float()  # a view: channels_last in memory
        out = self.backbone(pixel_values=x * self.scale - self.offset).last_hidden_state
        vectors: Tensor = self.projection(self.pool(out))
        return vectors

    def pool(self, hidden: Tensor) -> Tensor:
        """(B, F) from maps (B, F, h, w) or tokens (B, T, F); tokens are pooled without the first where there is one."""
        kind = self.config.pooling
        if hidden.ndim == 3:
            if kind == "cls":
                return hidden[:, 0]
            hidden = hidden[:, 1:].transpose(1, 2)
        elif kind == "cls":
            raise InputError(
                f"pooling cls needs a token model; {self.config.backbone['model_type']} gives maps: use avg"
            )
        else:
            hidden = hidden.flatten(2)
        if kind == "max":
            return hidden.amax(2)
        if kind == "gem":
            assert self.power is not None
            return hidden.clamp(min=1e-6).pow(self.power).mean(2).pow(1 / self.power)
        return hidden.mean(2)


def build(config: NetworkConfig) -> nn.Module:
    """A backbone with random weights."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise MissingExtraError("transformers", "images", "an image backbone") from error
    fields = dict(config.backbone)
    try:
        made = AutoConfig.for_model(fields.pop("model_type"), **fields)
        maker: Any = AutoModel
        backbone: nn.Module = maker.from_config(made)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"transformers cannot build {config.backbone}: {str(error).splitlines()[0]}") from error
    if config.stem != "built":
        _small_stem(backbone, 1 if config.stem == "small" else 2)
    return backbone


def pretrained(name: str | Path, width: int | None = None, size: int = 224, pooling: Pooling = "avg") -> Network:
    """A network around a backbone of a transformers folder or hub name: safetensors only, never remote code."""
    from transformers import AutoModel

    try:
        backbone = AutoModel.from_pretrained(str(name), trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load backbone {str(name)!r}: {reason[0]}; give a transformers folder") from error
    fields = {k: v for k, v in backbone.config.to_diff_dict().items() if k not in ("architectures", "dtype")}
    fields["model_type"] = backbone.config.model_type
    return Network(NetworkConfig(fields, width=width, size=size, pooling=pooling), backbone)


def features_of(backbone: Any) -> int:
    """How many features a backbone gives: the last of `hidden_sizes`, or `hidden_size`."""
    config = backbone.config
    sizes = getattr(config, "hidden_sizes", None)
    size = sizes[-1] if sizes else getattr(config, "hidden_size", None)
    if not size:
        raise InputError(f"{config.model_type} says neither hidden_sizes nor hidden_size; it is no image backbone")
    return int(size)


def _small_stem(backbone: Any, stride: int) -> None:
    stem = backbone.embedder
    old = stem.embedder.convolution
    stem.embedder.convolution = nn.Conv2d(
        old.in_channels, old.out_channels, kernel_size=3, stride=stride, padding=1, bias=False
    )
    nn.init.kaiming_normal_(stem.embedder.convolution.weight, mode="fan_out", nonlinearity="relu")
    stem.pooler = nn.Identity()
