"""A model: an encoder, the widths it was trained for, and one `encode` with a true width knob."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matryo.core.codecs import codec
from matryo.core.errors import InputError
from matryo.core.prefix import Nesting, check_width, truncate
from matryo.core.records import check_texts

Float32s = NDArray[np.float32]
Progress = Callable[[int], None]


class Encoder(Protocol):
    """What turns inputs into full-width vectors. Lengths do not matter; the model cuts and normalises.

    Inputs are texts, unless the encoder has an attribute `modality` that is "image".
    """

    @property
    def width(self) -> int:
        """Full width D."""

    def vectors(self, inputs: Sequence[Any], batch_size: int, progress: bool, /) -> Float32s:
        """(N, D) float32 for N inputs, in order."""


@dataclass(frozen=True)
class Card:
    """What is known about a model: where it came from, what it was trained for, what each width keeps."""

    name: str
    nesting: Nesting | None = None
    depths: tuple[int, ...] | None = None
    scores: tuple[dict[str, Any], ...] = ()
    """Rows of {task, metric, width, code, value, low, high}."""
    depth_scores: tuple[dict[str, Any], ...] = ()
    """Such rows for the depths below the last, with `depth`; float32 alone."""
    int8_scales: dict[int, Float32s] = field(default_factory=dict)
    """Per-dimension int8 scales of each width, fitted after the cut."""
    training: dict[str, Any] = field(default_factory=dict)
    """Configuration, data fingerprint, versions and seed."""


class Model:
    """A Matryo model. Get one from `matryo.load` or `matryo.train`."""

    def __init__(self, encoder: Encoder, card: Card) -> None:
        if card.nesting is not None:
            card.nesting.check(encoder.width)
        self.encoder = encoder
        self.card = card

    @property
    def name(self) -> str:
        """What the model was loaded as."""
        return self.card.name

    @property
    def width(self) -> int:
        """Full width D."""
        return self.encoder.width

    @property
    def nesting(self) -> Nesting | None:
        """Trained widths and weights; None if the model was not trained nested, or does not say."""
        return self.card.nesting

    @property
    def depths(self) -> tuple[int, ...] | None:
        """Trained depths; None if only the last layer was trained."""
        return self.card.depths

    def encode(
        self,
        inputs: Sequence[Any],
        width: int | None = None,
        depth: int | None = None,
        code: str = "float32",
        batch_size: int = 64,
        progress: bool = False,
    ) -> NDArray[Any]:
        """Encode texts, or pictures, to the first `width` dimensions, renormalised, stored as `code`.

        Args:
            inputs: N texts, none blank; for an image encoder N pictures: paths, bytes, PIL images or uint8 arrays
                (H, W, 3), or one array (N, H, W, 3).
            width: any of 1..D, trained or not; D by default.
            depth: number of layers to run, one of `depths`; all by default. The rest of the encoder is not run.
            code: float32, float16, bfloat16 (as uint16), int8 or binary (packed bits, width a multiple of 8).
            batch_size: inputs per forward pass.
            progress: show a bar on a terminal.

        Returns:
            (N, width) array of unit rows (float codes), or the codes of such rows.

        Raises:
            InputError: a blank text, a text for an image encoder or a picture for another, a broken picture, a width
                outside 1..D, an unknown depth or code, int8 at a width whose ranges the model folder does not hold (it
                holds those of all layers alone); or the model gave NaN, Inf or zeros for an input, named by its
                position.
        """
        width = check_width(self.width if width is None else width, self.width)
        model = self if depth is None else self.at(depth)
        store = codec(code, width)
        if code == "int8":
            if model is not self:
                raise InputError(
                    f"the model holds int8 ranges for all its layers, not for {depth}; encode as float32 and fit a "
                    "codec on your own vectors: matryo.core.codecs.codec('int8', width).fit(vectors)"
                )
            if width not in self.card.int8_scales:
                known = ", ".join(map(str, sorted(self.card.int8_scales))) or "none"
                raise InputError(
                    f"the model holds no int8 ranges for width {width} (it has {known}); encode as float32 and fit a "
                    "codec on your own vectors: matryo.core.codecs.codec('int8', width).fit(vectors)"
                )
            store.load({"scale": self.card.int8_scales[width]})
        return store.encode(truncate(model._vectors(inputs, width, batch_size, progress), width))

    def at(self, depth: int) -> "Model":
        """The model of the first `depth` layers, as it was trained; its weights are this one's.

        Raises:
            InputError: a depth that was not trained.
        """
        if self.depths is None or depth not in self.depths:
            allowed = "only the full depth" if self.depths is None else f"depths {list(self.depths)}"
            raise InputError(f"depth {depth!r} was not trained; this model has {allowed}")
        if depth == self.depths[-1]:
            return self
        encoder: Any = self.encoder
        scores = tuple(
            {key: value for key, value in row.items() if key != "depth"}
            for row in self.card.depth_scores
            if row["depth"] == depth
        )
        card = replace(self.card, depths=None, scores=scores, depth_scores=(), int8_scales={})
        return Model(encoder.at(depth), card)

    def features(self, inputs: Sequence[Any], batch_size: int = 64, progress: bool = False) -> Float32s:
        """(N, D) vectors of raw length, as the encoder gives them: what heads that do not normalise were trained on.

        Raises:
            InputError: as `encode`.
        """
        return self._vectors(inputs, self.width, batch_size, progress)

    def _vectors(self, inputs: Sequence[Any], width: int, batch_size: int, progress: bool) -> Float32s:
        """Full-width vectors whose first `width` dimensions can be normalised."""
        checked = self._checked(inputs)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a whole number above 0, got {batch_size!r}")
        full = self.encoder.vectors(checked, batch_size, progress)
        # A lone NaN dimension makes the sum NaN; a zero row sums to 0: one pass finds both.
        sums = np.einsum("nd,nd->n", full[:, :width], full[:, :width], dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(sums) | (sums == 0))
        if len(bad):
            what = "only zeros" if sums[bad[0]] == 0 else "NaN or Inf"
            raise InputError(f"the model gave {what} for inputs[{int(bad[0])}] at width {width}; it cannot encode it")
        return full

    def _checked(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs, if they are of the kind that the encoder takes."""
        if getattr(self.encoder, "modality", "text") == "text":
            if isinstance(inputs, str):
                raise InputError("inputs must be a list of texts, got one text; put it in a list")
            return check_texts(inputs, "inputs")
        if isinstance(inputs, (str, bytes, Path)) or not hasattr(inputs, "__len__"):
            raise InputError(f"inputs must be a list of pictures, got one {type(inputs).__name__}; put it in a list")
        if getattr(inputs, "ndim", 4) != 4:
            raise InputError(f"an array of pictures is (N, H, W, 3), got {tuple(np.shape(inputs))}; put one in a list")
        return inputs
