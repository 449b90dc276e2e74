"""Measuring every width on a dev set while training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.base.evaluation import BaseEvaluator

from matryo.core.errors import InputError
from matryo.core.metrics import Judgements, Metric, measure
from matryo.core.prefix import Nesting, truncate
from matryo.core.ranking import ranks_in_task
from matryo.core.records import Retrieval, ScoredPairs, read_pairs, read_retrieval, read_sts, rows

Encode = Callable[[list[str]], NDArray[np.float32]]


def read_dev(path: Path, split: str) -> Retrieval | ScoredPairs:
    """A retrieval folder, an STS file, or a pairs file taken as retrieval of each anchor's positive among all."""
    if path.is_dir():
        return read_retrieval(path, split)
    columns = next((row for _, row in rows(path)), {})
    if {"sentence1", "sentence2", "score"} <= set(columns):
        return read_sts(path)
    pairs = read_pairs(path)
    # The same positive may belong to several anchors: it is one document, relevant to each of them.
    place = {text: n for n, text in enumerate(dict.fromkeys(pairs.positives))}
    count = len(pairs)
    judged = Judgements(np.arange(count), np.array([place[text] for text in pairs.positives]), np.ones(count), count)
    ids = [str(n) for n in range(count)]
    return Retrieval(path.name.split(".")[0], pairs.anchors, ids, list(place), ids[: len(place)], judged)


class DevEvaluator(BaseEvaluator):
    """Scores of every trained width from one encoding, as {width_d: value, mean: value}."""

    def __init__(
        self, task: Retrieval | ScoredPairs, nesting: Nesting, metric: str, encode: Callable[[Any], Encode]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.task, self.nesting, self.encode = task, nesting, encode
        self.metric = Metric.parse(metric)
        self.greater_is_better = True
        self.primary_metric = "mean"

    @property
    def metric_name(self) -> str:
        """What the scores are."""
        return str(self.metric) if isinstance(self.task, Retrieval) else "Spearman"

    def __call__(self, model: Any, output_path: Any = None, epoch: int = -1, steps: int = -1) -> dict[str, float]:
        """Scores of the model as it is now."""
        scores = self.scores(self.encode(model))
        return {f"width_{width}": value for width, value in scores.items()} | {
            "mean": float(np.mean(list(scores.values())))
        }

    def scores(self, encode: Encode) -> dict[int, float]:
        """width -> score."""
        if isinstance(self.task, Retrieval):
            queries, documents = encode(self.task.queries), encode(self.task.texts)
            ranks = ranks_in_task(self.task, queries, documents, self.nesting.widths)
            return {w: float(measure(self.metric, r, self.task.judged).mean()) for w, r in ranks.items()}
        return _spearman_at_widths(encode, self.task, self.nesting)


def _spearman_at_widths(encode: Encode, task: ScoredPairs, nesting: Nesting) -> dict[int, float]:
    from scipy.stats import spearmanr

    first, second = encode(task.first), encode(task.second)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("the model gave NaN or Inf on the dev set; lower the learning rate")
    return {
        width: float(spearmanr((truncate(first, width) * truncate(second, width)).sum(1), task.scores).statistic)
        for width in nesting.widths
    }
