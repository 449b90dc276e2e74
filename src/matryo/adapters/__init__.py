"""Maps from vectors to vectors, fit -> transform, as scikit-learn estimators. Names resolve on first use."""

import importlib
from typing import Any

from matryo.core.errors import MissingExtraError

_HOME = {
    "PCA": ("matryo.adapters.projections", "scikit-learn", "eval"),
    "RandomProjection": ("matryo.adapters.projections", "scikit-learn", "eval"),
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'matryo.adapters' has no attribute {name!r}")
    home, package, extra = _HOME[name]
    try:
        return getattr(importlib.import_module(home), name)
    except ImportError as error:
        raise MissingExtraError(package, extra, f"matryo.adapters.{name}") from error


def __dir__() -> list[str]:
    return list(__all__)
