"""Classification of vectors: linear heads on prefixes, and the cascade that reads no more dimensions than it needs."""

from matryo.classify.adaptive import AdaptiveClassifier, Predicted, Tradeoff
from matryo.classify.heads import LinearHeads, fit_heads

__all__ = ["AdaptiveClassifier", "LinearHeads", "Predicted", "Tradeoff", "fit_heads"]
