"""Image encoders: pictures in, full-width vectors out. Needs torch, transformers and Pillow (the `images` extra)."""

from matryo.encoders.images.pictures import Pictures, decode, read_pictures

__all__ = ["Pictures", "decode", "read_pictures"]
