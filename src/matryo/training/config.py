"""What to train, checked at construction: a bad combination dies here, before any data is read."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from matryo.core.depths import Alignment, DepthNesting
from matryo.core.errors import InputError
from matryo.core.metrics import Metric
from matryo.core.prefix import Nesting
from matryo.training.objectives import check_arguments, recipe


class _Checked(BaseModel):
    """A frozen model whose errors are ours: one line, naming the field, what it got and what is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or type(self).__name__
            allowed = f"; allowed: {', '.join(type(self).model_fields)}" if first["type"] == "extra_forbidden" else ""
            got = f", got {first['input']!r}" if first["type"] not in ("missing", "value_error") else ""
            raise InputError(f"{where}: {first['msg'].removeprefix('Value error, ')}{got}{allowed}") from error


class StaticConfig(_Checked):
    """A static encoder made for the run: from scratch, or from given vectors."""

    width: int = Field(512, ge=1, description="Full width D of a table made from scratch.")
    vocabulary: int = Field(20000, ge=100, description="Tokens of a WordPiece tokeniser trained on the pairs.")
    idf: float = Field(1.0, ge=0, description="Token vectors start as random rows of length ~ idf(token) ** idf.")
    tokenizer: Path | None = Field(None, description="tokenizer.json to use instead of training one.")
    vectors: Path | None = Field(None, description="(tokens, D) .npy or .safetensors to start from; needs tokenizer.")

    @model_validator(mode="after")
    def _both(self) -> "StaticConfig":
        if self.vectors is not None and self.tokenizer is None:
            raise ValueError("vectors need the tokenizer that numbers their rows; give tokenizer as well")
        return self


class DataConfig(_Checked):
    """One data set of a run, and the loss it is trained with."""

    path: Path = Field(description="Parquet, JSONL(.gz), CSV or TSV with the columns that the loss needs.")
    loss: str = Field("info_nce", description="Name of the loss.")
    loss_args: dict[str, Any] = Field(default_factory=dict, description="Arguments of the loss.")
    teacher: str | None = Field(
        None, description="Model to learn from (folder, hub name or 'toy'), or a file of one vector per row."
    )
    weight: float = Field(1.0, gt=0, description="What the loss is multiplied by.")
    name: str | None = Field(None, pattern=r"^\w+$", description="Its name in logs; the file's name if unset.")

    @model_validator(mode="after")
    def _loss_exists(self) -> "DataConfig":
        check_arguments(self.loss, self.loss_args)
        wanted = recipe(self.loss).teacher
        if wanted and self.teacher is None:
            raise ValueError(f"loss {self.loss!r} needs a teacher: a model to learn from; give teacher")
        if self.teacher is not None and not wanted:
            raise ValueError(f"loss {self.loss!r} learns from no teacher; drop it")
        return self


class DepthConfig(_Checked):
    """The depths trained beside the widths: 2D Matryoshka (arXiv 2402.14776), Starbucks (arXiv 2410.13230).

    All depths cost little more than one: they share their layers. What 2D Matryoshka trains, the last layer and one
    other drawn for each step, is `sample: 2`; Starbucks' fixed pairs are `widths`.
    """

    depths: tuple[int, ...] | None = Field(None, description="Layers run, all of them last; every depth if unset.")
    weights: tuple[float, ...] | None = Field(None, description="One weight per depth; all 1 if unset.")
    widths: tuple[tuple[int, ...], ...] | None = Field(
        None, description="The widths of each depth, where not all are trained at all: fixed pairs."
    )
    sample: int | None = Field(
        None, ge=2, description="Train so many depths a step, drawn anew, the last among them; all if unset."
    )
    align: float = Field(1.0, ge=0, description="Weight of each depth's distance to the last layer, at every width.")
    alignment: Alignment = Field("kl", description="What that distance is: kl, cosine, mse, similarity or neighbours.")
    temperature: float | None = Field(None, gt=0, description="Of kl (0.3 if unset) and of neighbours (0.05).")

    def nesting(self, layers: int, widths: Nesting) -> DepthNesting:
        """The depths for an encoder of so many layers and a model of these widths."""
        depths = DepthNesting.of(
            self.depths or tuple(range(1, layers + 1)), widths, self.weights, self.widths,
            align=self.align, alignment=self.alignment, temperature=self.temperature,
        )  # fmt: skip
        depths.check(layers)
        return depths


class LoraConfig(_Checked):
    """Low-rank adapters (arXiv 2106.09685) trained in place of the whole encoder, and merged into it at the end."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = Field(
        None, description="Names of the layers to adapt; peft's choice for the architecture if unset."
    )


class TrainConfig(_Checked):
    """One training run. Every field has a command line option of the same name; `from_yaml` reads a file of them."""

    pairs: Path | None = Field(
        None, description="Parquet, JSONL(.gz), CSV or TSV with the columns the loss needs: anchor, positive[, ...]."
    )
    out: Path = Field(description="Model folder to write; checkpoints lie inside it until the run ends.")
    base: str | None = Field(None, description="Model folder or hub name to start from; a new static encoder if unset.")
    static: StaticConfig = Field(default_factory=StaticConfig)
    widths: tuple[int, ...] | None = Field(None, description="Widths to train; D/32 doubling to D if unset.")
    weights: tuple[float, ...] | None = Field(None, description="One weight per width; all 1 if unset.")
    loss: str = Field("info_nce", description="Name of the loss.")
    loss_args: dict[str, Any] = Field(default_factory=dict, description="Arguments of the loss.")
    teacher: str | None = Field(
        None, description="Model that the loss learns from, or a file of its vectors; for distill, the base if unset."
    )
    temperature: float | tuple[float, ...] | None = Field(
        None, description="Short for the loss argument of that name: one, or one per width."
    )
    symmetric: bool = Field(False, description="Short for the loss argument: also contrast candidates with anchors.")
    data: tuple[DataConfig, ...] = Field((), description="Several data sets, each with its loss, in place of pairs.")
    mixing: Literal["proportional", "round_robin"] = Field(
        "proportional", description="Every row of every data set once an epoch, or as many batches of each."
    )
    no_duplicates: bool = Field(False, description="No text twice in a batch, where others are negatives.")
    neighbours: bool = Field(
        False, description="Batches of rows that are near each other by the teacher's vectors, where rows are compared."
    )
    epochs: int = Field(5, ge=0, description="Passes over the rows; 0 trains nothing and only turns the base (rotate).")
    batch_size: int = Field(1024, ge=2, description="Rows a step, of all processes together; others are negatives.")
    mini_batch_size: int | None = Field(
        None, ge=1, description="Embed so many rows at a time and keep no more activations; exact (GradCache)."
    )
    sample_widths: int | None = Field(
        None, ge=1, description="Train so many widths a step, drawn anew, the full one among them; all if unset."
    )
    depths: DepthConfig | None = Field(
        None, description="Train several depths (layers) too: a list of them, 'all', or a mapping."
    )
    layers: tuple[int, ...] | None = Field(
        None, description="Start from these layers of the base, in this order, counted from 1; all if unset."
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters instead of all weights.")
    rotate: Literal["none", "pca", "learned"] = Field(
        "none",
        description="Turn the base's vectors first: to axes learned for the widths, or to principal axes (pca), which "
        "are for data of one kind.",
    )
    blend: float = Field(
        1.0, gt=0, le=1, description="Share of the trained weights in what is written; the rest is the base's, turned."
    )
    learning_rate: float | None = Field(None, gt=0, description="Peak rate; 0.2 for static, 2e-5 for others if unset.")
    head_learning_rate: float | None = Field(
        None, gt=0, description="Peak rate of what a loss learns beside the model; between 0.001 and 0.01 if unset."
    )
    warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of all steps in which the rate rises; then it falls to 0."
    )
    weight_decay: float = Field(0.0, ge=0)
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of products in training, and of a teacher that is a model; weights stay in float32."
    )
    dev: Path | None = Field(None, description="Retrieval folder, STS file or pairs file, measured while training.")
    dev_split: str = Field("dev", description="Which judgements of a retrieval folder.")
    metric: str = Field("nDCG@10", description="Retrieval metric on the dev set.")
    best: int | Literal["mean", "last"] = Field(
        "mean", description="Keep the checkpoint best at this width, by the mean of all, or the last."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many measurements without a better one at `best`."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Checkpoint and measure every so many steps; once an epoch if unset."
    )
    seed: int = Field(0, ge=0)
    device: str | None = Field(None, description="cpu, cuda, ...; torch's choice if unset.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps whatever the epochs.")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: dict[str, Any]) -> dict[str, Any]:
        if isinstance(values.get("lora"), int):
            values = {**values, "lora": {"r": values["lora"]}}
        if values.get("depths") == "all":
            values = {**values, "depths": {}}
        elif isinstance(values.get("depths"), (list, tuple)):
            values = {**values, "depths": {"depths": values["depths"]}}
        if isinstance(values.get("rotate"), bool):
            # As it was written when principal axes were the only ones.
            values = {**values, "rotate": "pca" if values["rotate"] else "none"}
        return values

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        Metric.parse(self.metric)
        given = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not all(value is None or 0 < value < math.inf for value in given):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}; 0.05 is usual")
        self._check_data()
        if self.patience is not None and (self.dev is None or self.best == "last"):
            raise ValueError("patience needs a dev set to measure on and a width, or 'mean', as best; give dev")
        if self.lora is not None and self.base is None:
            raise ValueError("lora adapts a transformer; name one as base")
        if self.depths is not None and self.base is None:
            raise ValueError("a static encoder has no layers; depths are for a transformer: name one as base")
        if self.layers is not None and self.base is None:
            raise ValueError("a static encoder has no layers; layers are chosen of a transformer: name one as base")
        if self.layers is not None and self.rotate != "none":
            raise ValueError(
                "chosen layers mean little before they are trained, and rotate turns what a model gives already; turn "
                "the base first (rotate, epochs 0), and choose layers of what that writes"
            )
        if self.layers is not None and self.blend < 1:
            raise ValueError("blend goes back towards the start, and chosen layers mean little before they are trained")
        if self.depths is not None and self.depths.widths is not None and self.sample_widths is not None:
            raise ValueError("depths with widths of their own and sample_widths both choose the widths; drop one")
        if self.rotate != "none" and self.base is None:
            raise ValueError("rotate turns the vectors of a model that exists; name one as base")
        if self.blend < 1 and self.base is None:
            raise ValueError("blend mixes trained weights with those of a model that exists; name one as base")
        if self.blend < 1 and self.lora is not None:
            raise ValueError("blend mixes whole weights; with lora lower its alpha instead")
        if self.blend < 1 and any(recipe(one.loss).head for one in self.sets()):
            raise ValueError("blend mixes weights from before and after training, and a classifier has none before")
        if self.epochs == 0 and self.rotate == "none":
            raise ValueError("0 epochs train nothing; that is for turning a base: give rotate, or more epochs")
        if self.widths is not None:
            nesting = Nesting(self.widths, self.weights)
            if isinstance(self.best, int) and self.best not in nesting.widths:
                raise ValueError(f"best: width {self.best} is not among the trained widths {list(nesting.widths)}")
        elif self.weights is not None:
            raise ValueError("weights need widths: one weight per width")
        if self.base is not None and self.static != StaticConfig():
            raise ValueError("static describes a new encoder, but base names an existing one; drop one of the two")
        return self

    def _check_data(self) -> None:
        if self.pairs is None and not self.data:
            raise ValueError("pairs: Field required, or data for several files")
        if self.pairs is not None and self.data:
            raise ValueError("pairs is short for one data set; put its file into data and drop pairs")
        at_the_top = (self.loss, self.loss_args, self.teacher, self.temperature, self.symmetric)
        if self.data and at_the_top != ("info_nce", {}, None, None, False):
            raise ValueError("with data, each data set names its own loss and loss_args; drop them at the top")
        sets = self.sets()
        contrastive = [one for one in sets if recipe(one.loss).rows == "pairs"]
        if self.no_duplicates and not contrastive:
            losses = ", ".join(dict.fromkeys(one.loss for one in sets))
            raise ValueError(f"no_duplicates is for losses whose negatives are the rest of the batch, not {losses}")
        if self.neighbours and not any(one.teacher and recipe(one.loss).other_rows for one in sets):
            raise ValueError(
                "neighbours makes batches by a teacher's vectors, for losses that compare rows; give loss distill or "
                "guided_info_nce, and a teacher"
            )
        if self.neighbours and self.no_duplicates:
            raise ValueError("neighbours and no_duplicates both choose the batches; drop one")

    def sets(self) -> tuple[DataConfig, ...]:
        """The data sets; `pairs` and the options beside it are short for one."""
        if self.pairs is None:
            return self.data
        short = {"temperature": self.temperature, "symmetric": self.symmetric or None}
        given = {name: value for name, value in short.items() if value is not None}
        twice = sorted(given.keys() & self.loss_args.keys())
        if twice:
            raise InputError(f"{twice[0]} is given twice: as an option and in loss_args; drop one of the two")
        arguments = {**self.loss_args, **given}
        teacher = self.teacher or (self.base if self.loss == "distill" else None)
        return (DataConfig(path=self.pairs, loss=self.loss, loss_args=arguments, teacher=teacher),)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "TrainConfig":
        """Read a YAML mapping of these fields; keyword arguments win over the file."""
        content = _mapping_in(path, cls.model_fields)
        # Another loss has other arguments, so those of the file go with the file's loss.
        for name in ("static",) if "loss" in overrides else ("static", "loss_args"):
            if isinstance(content.get(name), dict) and isinstance(overrides.get(name), dict):
                overrides[name] = {**content[name], **overrides[name]}
        if "loss" in overrides:
            content.pop("loss_args", None)
        return cls(**{**content, **overrides})

    def nesting(self, full: int) -> Nesting:
        """The nesting for an encoder of `full` dimensions."""
        if self.widths is None:
            return Nesting.doubling(min(full, max(8, full // 32)), full)
        nesting = Nesting(self.widths, self.weights)
        nesting.check(full)
        return nesting

    def rate(self, static: bool) -> float:
        """Peak learning rate."""
        return self.learning_rate or (0.2 if static else 2e-5)

    def head_rate(self, static: bool) -> float:
        """Peak learning rate of heads and learned arguments: they start from nothing, unlike a model."""
        return self.head_learning_rate or min(max(self.rate(static), 1e-3), 1e-2)


class PictureConfig(_Checked):
    """A training run on pictures, as far as a YAML file says it; what is left out is `ImageConfig`'s default."""

    out: Path | None = Field(None, description="Model folder to write.")
    base: str | None = Field(None, description="Folder or hub name of transformers, or an image model's folder.")
    dim: int | None = Field(None, ge=1, description="Full width D.")
    widths: tuple[int, ...] | None = Field(None, description="Widths to train.")
    loss: str | None = Field(None, description="cross_entropy, supcon or multi_similarity.")
    loss_args: dict[str, Any] = Field({}, description="tied and label_smoothing.")
    picture: dict[str, Any] = Field({}, description="size, pooling, model_type, stem and bad.")
    epochs: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=2)
    learning_rate: float | None = Field(None, gt=0)
    seed: int | None = None
    per_class: int | None = Field(None, ge=2, description="Pictures of a class in a batch of a contrastive loss.")
    warmup: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)
    padding: int | None = Field(None, ge=0)
    flip: bool | None = None
    precision: Literal["float32", "bfloat16"] | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> "PictureConfig":
        """Read a YAML mapping of these fields."""
        return cls(**_mapping_in(path, cls.model_fields))


def _mapping_in(path: str | Path, fields: Iterable[str]) -> dict[str, Any]:
    import yaml

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of {', '.join(fields)}")
    return content
