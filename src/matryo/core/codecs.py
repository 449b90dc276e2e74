"""Codes: how a prefix is stored. A codec is fitted on prefixes of ONE width, after the cut, and keeps its own scale.

Cutting first matters: ranges taken at full width are set by dimensions that are about to be thrown away, and a cut row
is longer after renormalisation than the same numbers were before it.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.prefix import check_width

Float32s = NDArray[np.float32]
Codes = NDArray[Any]


class Codec(ABC):
    """fit -> encode -> decode, for unit prefixes of one width.

    `fit` learns the scale (a no-op where there is none), `encode` maps (N, width) float32 to codes, `decode` maps codes
    back to (N, width) float32 that can be scored by inner product. `state` holds everything learnt, as plain arrays.
    """

    name: ClassVar[str]

    def __init__(self, width: int) -> None:
        self.width = check_width(width, 1 << 20)

    def fit(self, prefixes: Float32s) -> "Codec":
        """Learn the scale from (N, width) unit prefixes, N >= 1. Returns self."""
        self._checked(prefixes)
        return self

    @abstractmethod
    def encode(self, prefixes: Float32s) -> Codes:
        """(N, width) float32 -> (N, ...) codes."""

    @abstractmethod
    def decode(self, codes: Codes) -> Float32s:
        """(N, ...) codes -> (N, width) float32."""

    @property
    @abstractmethod
    def bytes_per_item(self) -> int:
        """Bytes one item's code takes."""

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """What `fit` learnt; empty for codecs without a scale."""
        return {}

    def load(self, state: dict[str, NDArray[Any]]) -> "Codec":
        """Take over a `state` saved earlier. Returns self."""
        if state:
            raise InputError(f"{self.name} has no state, got {sorted(state)}")
        return self

    def _checked(self, prefixes: Float32s) -> Float32s:
        if prefixes.ndim != 2 or prefixes.shape[1] != self.width:
            raise InputError(f"this {self.name} codec is for width {self.width}, got vectors of shape {prefixes.shape}")
        if not np.isfinite(prefixes).all():
            bad = int(np.flatnonzero(~np.isfinite(prefixes).all(axis=1))[0])
            raise InputError(f"row {bad} holds NaN or Inf; remove it or encode it again")
        return prefixes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.width})"


class Float32(Codec):
    """As it is: 4 bytes a dimension."""

    name = "float32"

    def encode(self, prefixes: Float32s) -> Codes:
        return self._checked(np.asarray(prefixes, dtype=np.float32))

    def decode(self, codes: Codes) -> Float32s:
        return np.asarray(codes, dtype=np.float32)

    @property
    def bytes_per_item(self) -> int:
        return 4 * self.width


class Float16(Codec):
    """IEEE half precision: 2 bytes a dimension, relative error at most 2^-11."""

    name = "float16"

    def encode(self, prefixes: Float32s) -> Codes:
        return self._checked(np.asarray(prefixes, dtype=np.float32)).astype(np.float16)

    def decode(self, codes: Codes) -> Float32s:
        return np.asarray(codes).astype(np.float32)

    @property
    def bytes_per_item(self) -> int:
        return 2 * self.width


class BFloat16(Codec):
    """The upper half of a float32, rounded to nearest even, kept as uint16: relative error at most 2^-8."""

    name = "bfloat16"

    def encode(self, prefixes: Float32s) -> Codes:
        bits = np.ascontiguousarray(self._checked(np.asarray(prefixes, dtype=np.float32))).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded >> np.uint32(16)).astype(np.uint16)

    def decode(self, codes: Codes) -> Float32s:
        wide: NDArray[np.uint32] = np.asarray(codes, dtype=np.uint32) << np.uint32(16)
        return wide.view(np.float32)

    @property
    def bytes_per_item(self) -> int:
        return 2 * self.width


class Int8(Codec):
    """One signed byte a dimension, symmetric, one scale per dimension: code = round(x / scale), |code| <= 127.

    The scale of a dimension is its largest magnitude over the fitted prefixes divided by 127. Inside that range the
    error is at most scale / 2; a later value outside it is clipped to the edge.
    """

    name = "int8"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale: Float32s | None = None

    def fit(self, prefixes: Float32s) -> "Int8":
        checked = self._checked(np.asarray(prefixes, dtype=np.float32))
        if len(checked) == 0:
            raise InputError("int8 needs at least one vector to fit its ranges, got none")
        reach = np.maximum(np.abs(checked).max(axis=0), np.float32(1e-6))
        self.scale = (reach / np.float32(127)).astype(np.float32)
        return self

    @property
    def _fitted(self) -> Float32s:
        if self.scale is None:
            raise InputError("this int8 codec has no ranges yet; call fit(prefixes) first")
        return self.scale

    def encode(self, prefixes: Float32s) -> Codes:
        checked = self._checked(np.asarray(prefixes, dtype=np.float32))
        codes: Codes = np.clip(np.rint(checked / self._fitted), -127, 127).astype(np.int8)
        return codes

    def decode(self, codes: Codes) -> Float32s:
        return np.asarray(codes, dtype=np.float32) * self._fitted

    @property
    def bytes_per_item(self) -> int:
        return self.width

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        return {"scale": self._fitted}

    def load(self, state: dict[str, NDArray[Any]]) -> "Int8":
        scale = np.asarray(state["scale"], dtype=np.float32) if set(state) == {"scale"} else np.empty(0)
        if scale.shape != (self.width,) or not (np.isfinite(scale) & (scale > 0)).all():
            raise InputError(f"int8 at width {self.width} needs 'scale': {self.width} positive numbers")
        self.scale = scale.astype(np.float32)
        return self


class Int4(Codec):
    """Four bits a dimension, two dimensions a byte (the earlier one in the low half), one step per dimension.

    A value falls into one of 16 cells of `step`, the middle of which it decodes to: code = floor(x / step) + 8, decoded
    (code - 7.5) * step. The step is a third of the dimension's root mean square, which loses least on normal numbers
    (J. Max, "Quantizing for minimum distortion", 1960, table II: 0.335), or less where the largest magnitude needs no
    more. Inside +-8 steps the error is at most step / 2; what lies outside is clipped.
    """

    name = "int4"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.step: Float32s | None = None

    def fit(self, prefixes: Float32s) -> "Int4":
        checked = self._checked(np.asarray(prefixes, dtype=np.float32))
        if len(checked) == 0:
            raise InputError("int4 needs at least one vector to fit its steps, got none")
        spread = np.sqrt(np.einsum("nd,nd->d", checked, checked, dtype=np.float64) / len(checked))
        step = np.minimum(0.335 * spread, np.abs(checked).max(axis=0) / 8)
        self.step = np.maximum(step, 1e-6).astype(np.float32)
        return self

    @property
    def _fitted(self) -> Float32s:
        if self.step is None:
            raise InputError("this int4 codec has no steps yet; call fit(prefixes) first")
        return self.step

    def encode(self, prefixes: Float32s) -> Codes:
        checked = self._checked(np.asarray(prefixes, dtype=np.float32))
        cells = np.clip(np.floor(checked / self._fitted) + 8, 0, 15).astype(np.uint8)
        if self.width % 2:
            cells = np.pad(cells, ((0, 0), (0, 1)))
        codes: Codes = cells[:, ::2] | (cells[:, 1::2] << np.uint8(4))
        return codes

    def decode(self, codes: Codes) -> Float32s:
        packed = np.asarray(codes, dtype=np.uint8)
        cells = np.empty((len(packed), 2 * packed.shape[1]), np.float32)
        cells[:, ::2], cells[:, 1::2] = packed & np.uint8(15), packed >> np.uint8(4)
        cells -= np.float32(7.5)
        return cells[:, : self.width] * self._fitted

    @property
    def bytes_per_item(self) -> int:
        return (self.width + 1) // 2

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        return {"step": self._fitted}

    def load(self, state: dict[str, NDArray[Any]]) -> "Int4":
        step = np.asarray(state["step"], dtype=np.float32) if set(state) == {"step"} else np.empty(0)
        if step.shape != (self.width,) or not (np.isfinite(step) & (step > 0)).all():
            raise InputError(f"int4 at width {self.width} needs 'step': {self.width} positive numbers")
        self.step = step.astype(np.float32)
        return self


class Binary(Codec):
    """One sign bit a dimension, packed big-endian first as numpy.packbits does; the width must be a multiple of 8.

    A bit is 1 where the value is above 0. Decodes to +-1/sqrt(width), so decoded rows are unit vectors and the inner
    product of two of them is 1 - 2 Hamming / width.
    """

    name = "binary"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        if width % 8:
            raise InputError(
                f"binary codes need a width that is a multiple of 8, got {width}; try {max(8, width // 8 * 8)}"
            )

    def encode(self, prefixes: Float32s) -> Codes:
        return np.packbits(self._checked(np.asarray(prefixes, dtype=np.float32)) > 0, axis=1)

    def decode(self, codes: Codes) -> Float32s:
        bits = np.unpackbits(np.asarray(codes, dtype=np.uint8), axis=1, count=self.width)
        return (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(self.width))

    @property
    def bytes_per_item(self) -> int:
        return self.width // 8


CODECS: dict[str, type[Codec]] = {c.name: c for c in (Float32, Float16, BFloat16, Int8, Int4, Binary)}


def codec(name: str, width: int) -> Codec:
    """An unfitted codec by name, for one width."""
    if name not in CODECS:
        raise InputError(f"unknown code {name!r}; this release stores {', '.join(CODECS)}")
    return CODECS[name](width)
