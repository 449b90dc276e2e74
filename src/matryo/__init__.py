"""Matryo: one embedding model, every size."""

import importlib
from typing import Any

__version__ = "0.11.0"

# The front door. Names resolve on first use, so that `import matryo` is quick and pulls in no torch.
_HOME = {
    "truncate": "matryo.core.prefix",
    "Nesting": "matryo.core.prefix",
    "Plan": "matryo.core.plan",
    "Index": "matryo.index",
    "load": "matryo.encoders",
    "train": "matryo.training",
    "TrainConfig": "matryo.training",
    "evaluate": "matryo.evaluation",
    "plan": "matryo.planner",
    "Client": "matryo.clients",
    "AsyncClient": "matryo.clients",
    "AdaptiveClassifier": "matryo.classify",
    "adapters": "matryo",
    "losses": "matryo",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'matryo' has no attribute {name!r}")
    home = _HOME[name]
    if home == "matryo":
        return importlib.import_module(f"matryo.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return list(__all__)
