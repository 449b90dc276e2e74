"""Rank metrics as values: `nDCG@10` prints as it is typed and is computed from the ranks of the judged documents alone.

Definitions follow trec_eval. Nothing else about a ranking matters to these metrics than where the relevant documents
stand, so no top-k list is needed: counting how many documents beat each judged one gives every metric at every cut.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError

Ints = NDArray[np.int64]
Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]

NAMES = ("nDCG", "recall", "MRR", "mAP")


@dataclass(frozen=True)
class Metric:
    """A rank metric with its cut: nDCG@k, recall@k, MRR@k or mAP@k."""

    name: str
    k: int

    def __post_init__(self) -> None:
        if self.name not in NAMES or self.k < 1:
            raise InputError(f"unknown metric {self.name}@{self.k}; use one of {', '.join(f'{n}@10' for n in NAMES)}")

    @classmethod
    def parse(cls, text: str) -> "Metric":
        """`Metric.parse("nDCG@10")`, reading names without regard to case."""
        found = re.fullmatch(r"([A-Za-z]+)@([1-9][0-9]*)", text.strip())
        names = {name.lower(): name for name in NAMES}
        if not found or found[1].lower() not in names:
            raise InputError(f"unknown metric {text!r}; use one of {', '.join(f'{n}@10' for n in NAMES)}")
        return cls(names[found[1].lower()], int(found[2]))

    def __str__(self) -> str:
        return f"{self.name}@{self.k}"


@dataclass(frozen=True)
class Judgements:
    """Relevance judgements in flat arrays: pair p gives `documents[p]` a grade `grades[p]` > 0 for `queries[p]`.

    Sorted by query. Every query 0..count-1 has at least one relevant document; unjudged queries are left out before.
    """

    queries: Ints
    documents: Ints
    grades: Float64s
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError("no query has a relevant document; check that the qrels file belongs to these queries")
        seen = np.bincount(self.queries, minlength=self.count)
        if (np.diff(self.queries) < 0).any() or len(seen) != self.count or (seen == 0).any():
            raise InputError("judgements must be sorted by query and give each query a relevant document")
        if not (self.grades > 0).all():
            raise InputError("judgements hold relevant documents only (grade above 0)")


SORT_FROM = 6
"""From so many judged documents in a row on, sorting the row once is cheaper than comparing it with each of them."""


def judged_ranks(scores_RN: Float32s, queries: Ints, documents: Ints) -> Ints:
    """Rank (0 = best) of document `documents[p]` in row `queries[p]` of the scores, ties to the lower position.

    `queries` are sorted. Scores hold no NaN.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    edges = np.flatnonzero(np.r_[True, queries[1:] != queries[:-1], True]) if len(queries) else np.zeros(1, np.int64)
    for a, b in itertools.pairwise(edges.tolist()):
        ranks[a:b] = ranks_in_row(scores_RN[queries[a]], documents[a:b])
    return ranks


def ranks_in_row(scores_N: Float32s, documents: Ints) -> Ints:
    """Rank (0 = best) of each of `documents` in one row of scores, ties to the lower position; scores hold no NaN."""
    own = scores_N[documents]
    if len(documents) < SORT_FROM:
        counts = [
            np.count_nonzero(scores_N[:d] >= score) + np.count_nonzero(scores_N[d + 1 :] > score)
            for d, score in zip(documents.tolist(), own, strict=True)
        ]
        return np.array(counts, dtype=np.int64)
    rising = np.sort(scores_N)
    ranks = len(rising) - np.searchsorted(rising, own, side="right")
    tied = len(rising) - np.searchsorted(rising, own, side="left") - ranks > 1
    for p in np.flatnonzero(tied).tolist():
        ranks[p] += np.count_nonzero(scores_N[: documents[p]] == own[p])
    return ranks.astype(np.int64)


def measure(metric: Metric, ranks: Ints, judged: Judgements) -> Float64s:
    """The metric of each query, (count,), from the rank of each judged pair.

    nDCG uses the grade as gain and 1/log2(rank + 1) as discount, its ideal runs over all judged documents; recall and
    average precision divide by all relevant documents, found or not; MRR is 0 where none stands in the first k.
    """
    inside = ranks < metric.k
    queries = judged.queries

    def total(values: Float64s) -> Float64s:
        return np.bincount(queries, weights=values, minlength=judged.count).astype(np.float64, copy=False)

    if metric.name == "nDCG":
        gained = total(np.where(inside, judged.grades, 0.0) / np.log2(ranks + 2.0))
        order = np.lexsort((-judged.grades, queries))
        place = _place_in_query(queries)
        ideal = total(np.where(place < metric.k, judged.grades[order], 0.0) / np.log2(place + 2.0))
        return gained / ideal
    relevant = np.bincount(queries, minlength=judged.count)
    if metric.name == "recall":
        return total(inside.astype(np.float64)) / relevant
    if metric.name == "MRR":
        best = np.zeros(judged.count)
        np.maximum.at(best, queries, np.where(inside, 1.0 / (ranks + 1.0), 0.0))
        return best
    order = np.lexsort((ranks, queries))
    precision = (_place_in_query(queries) + 1.0) / (ranks[order] + 1.0)
    return total(np.where(inside[order], precision, 0.0)) / relevant


def _place_in_query(queries: Ints) -> Ints:
    """0, 1, 2, ... within each run of equal values of a sorted array."""
    starts = np.flatnonzero(np.r_[True, queries[1:] != queries[:-1]])
    return np.arange(len(queries)) - np.repeat(starts, np.diff(np.r_[starts, len(queries)]))


def check_metrics(metrics: Sequence[str | Metric]) -> list[Metric]:
    """Metrics from their names."""
    return [m if isinstance(m, Metric) else Metric.parse(m) for m in metrics]
