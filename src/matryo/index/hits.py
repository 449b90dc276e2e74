"""From rows to what the caller gets: the rows that match a filter, the search among them, and the hits."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

import numpy as np

from matryo.core.plan import Plan
from matryo.index import catalogue as cat
from matryo.index.funnel import Float32s, Rows, StageReport, finish, run
from matryo.index.items import Metadata
from matryo.index.scans.common import Allowed
from matryo.index.snapshot import Snapshot, View

SCAN_MATCHES_EXACTLY = 1000
"""A filter that leaves no more rows than this (or than the first stage keeps) is scored exactly, without a funnel."""


@dataclass(frozen=True)
class Hits:
    """Answers, one list per query, best first. A list is shorter than k where fewer items match.

    `scores` are full-width cosines of the query with the vectors as they are stored. With `explain=True`, `explanation`
    says what each stage did, and `promise` what recall is promised of this search and on what grounds.
    """

    ids: list[list[str]]
    scores: list[list[float]]
    documents: list[list[str | None]]
    metadata: list[list[Metadata | None]]
    explanation: list[StageReport] | None = None
    promise: str | None = None

    def __len__(self) -> int:
        return len(self.ids)


def matching(connection: sqlite3.Connection, snapshot: Snapshot, condition: tuple[str, list[Any]]) -> Allowed:
    """The rows whose metadata match; recent filters are remembered for as long as nothing is written."""
    sql, values = condition
    key = json.dumps([sql, values])
    known = snapshot.filters.known(key)
    if known is not None:
        return known
    found = connection.execute(f"SELECT row FROM items WHERE {sql} ORDER BY row", values).fetchall()
    mask = np.zeros(snapshot.state.end, dtype=bool)
    mask[np.array(found, dtype=np.int64).reshape(-1)] = True
    allowed = Allowed(mask)
    snapshot.filters.keep(key, allowed)
    return allowed


def filtered(
    snapshot: Snapshot, matches: Allowed, plan: Plan, unit: Float32s, k: int, reports: list[StageReport] | None
) -> list[tuple[Rows, Float32s]]:
    """Few matches: all of them by exact scores. Many: the funnel, its first stage confined to them."""
    if matches.count <= max(SCAN_MATCHES_EXACTLY, plan.stages[0].keep or 0, k):
        view = View(snapshot)
        answers = [finish(query, matches.rows, k, view) for query in unit]
        if reports is not None:
            each, name = [len(rows) for rows, _ in answers], "exact scan of the matching rows"
            reports.append(StageReport(name, matches.count * len(unit), sum(each), 0.0, each))
        return answers
    return run(plan, unit, k, View(snapshot, matches), reports)


def hits_of(
    connection: sqlite3.Connection, answers: list[tuple[Rows, Float32s]], reports: list[StageReport] | None
) -> Hits:
    """The hits of these rows, their items read and checked in the caller's transaction."""
    rows = [found.tolist() for found, _ in answers]
    items = cat.read_items(connection, list({row for found in rows for row in found}))
    return Hits(
        [[items[row][1] for row in found] for found in rows],
        [scores.tolist() for _, scores in answers],
        [[items[row][2] for row in found] for found in rows],
        [[_fields(items[row][3]) for row in found] for found in rows],
        reports,
    )


def _fields(text: str | None) -> Metadata | None:
    """Each hit gets a dict of its own, so that a caller may change it."""
    fields: Metadata | None = None if text is None else json.loads(text)
    return fields
