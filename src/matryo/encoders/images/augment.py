"""Augmentation of whole batches of uint8 pictures: one gather for the crops, one for the flips."""

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.encoders.images.pictures import Pixels


def crop_and_flip(pixels_BHWC: Pixels, rng: np.random.Generator, padding: int = 4, flip: bool = True) -> Pixels:
    """Shift each picture by up to `padding` pixels each way over its mirrored border, and mirror every second one.

    Args:
        pixels_BHWC: (B, H, W, C) uint8.
        rng: draws the shifts and the flips; the same state gives the same batch.
        padding: 0..min(H, W) - 1 pixels.
        flip: mirror left and right with chance 1/2.

    Returns:
        (B, H, W, C) uint8, a new array.
    """
    B, H, W, _ = pixels_BHWC.shape
    if not 0 <= padding < min(H, W):
        raise InputError(f"padding must be in 0..{min(H, W) - 1} for pictures of {H} x {W}, got {padding}")
    rows_BH = _places(H, B, padding, rng)
    columns_BW = _places(W, B, padding, rng)
    if flip:
        turned = rng.random(B) < 0.5
        columns_BW[turned] = columns_BW[turned, ::-1]
    return pixels_BHWC[np.arange(B)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def _places(length: int, batch: int, padding: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(batch, length) places to read along one axis, mirrored at both ends."""
    shifts = rng.integers(-padding, padding + 1, batch)
    places_BL: NDArray[np.int64] = np.abs(np.arange(length)[None, :] + shifts[:, None])
    over = places_BL >= length
    places_BL[over] = 2 * (length - 1) - places_BL[over]
    return places_BL
