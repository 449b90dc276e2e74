"""What to train, checked at construction: a bad combination dies here, before any data is read."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from matryo.core.errors import InputError
from matryo.core.metrics import Metric
from matryo.core.prefix import Nesting


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


class TrainConfig(_Checked):
    """One training run. Every field has a command line option of the same name; `from_yaml` reads a file of them."""

    pairs: Path = Field(description="Parquet, JSONL(.gz), CSV or TSV with anchor, positive[, negative...][, group].")
    out: Path = Field(description="Model folder to write; checkpoints lie inside it until the run ends.")
    base: str | None = Field(None, description="Model folder or hub name to start from; a new static encoder if unset.")
    static: StaticConfig = Field(default_factory=StaticConfig)
    widths: tuple[int, ...] | None = Field(None, description="Widths to train; D/32 doubling to D if unset.")
    weights: tuple[float, ...] | None = Field(None, description="One weight per width; all 1 if unset.")
    temperature: float | tuple[float, ...] | None = Field(None, description="One, or one per width.")
    symmetric: bool = Field(False, description="Also contrast candidates against anchors.")
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(1024, ge=2, description="Pairs a step; every other pair of the batch is a negative.")
    learning_rate: float | None = Field(None, gt=0, description="Peak rate; 0.2 for static, 2e-5 for others if unset.")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of all steps in which the rate rises; then it falls to 0."
    )
    weight_decay: float = Field(0.0, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    dev: Path | None = Field(None, description="Retrieval folder, STS file or pairs file, measured while training.")
    dev_split: str = Field("dev", description="Which judgements of a retrieval folder.")
    metric: str = Field("nDCG@10", description="Retrieval metric on the dev set.")
    best: int | Literal["mean", "last"] = Field(
        "mean", description="Keep the checkpoint best at this width, by the mean of all, or the last."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Checkpoint and measure every so many steps; once an epoch if unset."
    )
    seed: int = Field(0, ge=0)
    device: str | None = Field(None, description="cpu, cuda, ...; torch's choice if unset.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps whatever the epochs.")

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        Metric.parse(self.metric)
        given = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not all(value is None or 0 < value < math.inf for value in given):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}; 0.05 is usual")
        if self.widths is not None:
            nesting = Nesting(self.widths, self.weights)
            if isinstance(self.best, int) and self.best not in nesting.widths:
                raise ValueError(f"best: width {self.best} is not among the trained widths {list(nesting.widths)}")
        elif self.weights is not None:
            raise ValueError("weights need widths: one weight per width")
        if self.base is not None and self.static != StaticConfig():
            raise ValueError("static describes a new encoder, but base names an existing one; drop one of the two")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "TrainConfig":
        """Read a YAML mapping of these fields; keyword arguments win over the file."""
        import yaml

        path = Path(path)
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected a mapping of {', '.join(cls.model_fields)}")
        if isinstance(content.get("static"), dict) and isinstance(overrides.get("static"), dict):
            overrides["static"] = {**content["static"], **overrides["static"]}
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
