"""Training nested models: pairs in, model folder out."""

from matryo.core.errors import MissingExtraError

try:
    import pydantic as _pydantic  # noqa: F401
    import sentence_transformers as _sentence_transformers  # noqa: F401
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError(error.name or "sentence-transformers", "train", "training") from error

from matryo.training.config import DataConfig, LoraConfig, StaticConfig, TrainConfig
from matryo.training.heads import load_head
from matryo.training.progress import Step
from matryo.training.run import train
from matryo.training.user_losses import user_code

__all__ = ["DataConfig", "LoraConfig", "StaticConfig", "Step", "TrainConfig", "load_head", "train", "user_code"]
