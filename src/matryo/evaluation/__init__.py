"""Measuring: what each width and code costs and keeps, with intervals and honest baselines."""

from matryo.evaluation.evaluate import evaluate
from matryo.evaluation.report import Report, Section
from matryo.evaluation.rows import Row

__all__ = ["Report", "Row", "Section", "evaluate"]
