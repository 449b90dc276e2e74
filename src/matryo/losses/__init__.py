"""Nested losses: tensors in, scalar out. No loss here knows a model, so any trainer can use it."""

from importlib.util import find_spec

from matryo.core.errors import MissingExtraError

if find_spec("torch") is None:
    raise MissingExtraError("torch", "train", "matryo.losses")

from matryo.losses.classify import NestedHead, nested_cross_entropy
from matryo.losses.depths import over_depths
from matryo.losses.distill import nested_distill, nested_kl, nested_margin_mse
from matryo.losses.gather import Gathered, gather_with_gradient, gathered_info_nce, row_share
from matryo.losses.guided import guided_ignore, nested_guided_info_nce
from matryo.losses.info_nce import nested_info_nce
from matryo.losses.multi_similarity import nested_multi_similarity
from matryo.losses.nested import nested
from matryo.losses.quantise import nested_quantised_info_nce, straight_through
from matryo.losses.regularise import global_orthogonal
from matryo.losses.scored import nested_angle, nested_cosent
from matryo.losses.sigmoid import nested_sigmoid
from matryo.losses.supcon import nested_supcon
from matryo.losses.triplet import nested_online_contrastive, nested_triplet

__all__ = [
    "Gathered",
    "NestedHead",
    "gather_with_gradient",
    "gathered_info_nce",
    "global_orthogonal",
    "guided_ignore",
    "nested",
    "nested_angle",
    "nested_cosent",
    "nested_cross_entropy",
    "nested_distill",
    "nested_guided_info_nce",
    "nested_info_nce",
    "nested_kl",
    "nested_margin_mse",
    "nested_multi_similarity",
    "nested_online_contrastive",
    "nested_quantised_info_nce",
    "nested_sigmoid",
    "nested_supcon",
    "nested_triplet",
    "over_depths",
    "row_share",
    "straight_through",
]
