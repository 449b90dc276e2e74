"""Nested losses: tensors in, scalar out. No loss here knows a model, so any trainer can use it."""

from matryo.core.errors import MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("torch", "train", "matryo.losses") from error

from matryo.losses.gather import Gathered, gather_with_gradient, gathered_info_nce, row_share
from matryo.losses.info_nce import nested_info_nce
from matryo.losses.nested import nested

__all__ = ["Gathered", "gather_with_gradient", "gathered_info_nce", "nested", "nested_info_nce", "row_share"]
