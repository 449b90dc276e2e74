"""Measuring: what each width and code costs and keeps, with intervals and honest baselines."""

from matryo.core.labelled import LabelledTask
from matryo.evaluation.alone import train_alone
from matryo.evaluation.evaluate import evaluate, read_task
from matryo.evaluation.labelled import Spread, combine
from matryo.evaluation.report import Report, Section
from matryo.evaluation.rows import Row

__all__ = ["LabelledTask", "Report", "Row", "Section", "Spread", "combine", "evaluate", "read_task", "train_alone"]
