"""Measuring: what each width and code costs and keeps, with intervals and honest baselines."""

from matryo.evaluation.alone import train_alone
from matryo.evaluation.evaluate import evaluate, read_task
from matryo.evaluation.report import Report, Section
from matryo.evaluation.rows import Row

__all__ = ["Report", "Row", "Section", "evaluate", "read_task", "train_alone"]
