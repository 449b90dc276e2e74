"""Calibrating a plan: its shortlists made as short as a promise allows, each recall measured by a real search.

Two families of plans are tried. In one every query gets a shortlist of the same length. In the other each query stops
by itself: it keeps what scores within a distance of its k-th best, and not more than CAP times the rung's length; a
query whose scores fall fast keeps few. The distances rise with the rung, and are read off the scores of items, never of
the queries that the recalls come from. Each family is tested at half the error allowed, so that both choices hold at
once (a union bound), whichever is then taken for being shorter.

Letters in array names: Q queries, D full width, k answers.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np

from matryo.core.errors import InputError
from matryo.core.plan import NARROWEST, WIDEST, Plan, Stage
from matryo.core.promise import Floats, Promise, check_target, lower_bound, needed, shared, sizes, smallest
from matryo.index.funnel import Float32s, Rows, Source, lengths, run
from matryo.index.snapshot import Snapshot, View

ITEMS_ASKED = 1000
"""Items asked as queries, at most, where there are no queries yet."""
SEED = 0
PROFILED = 64
"""Items whose falling scores say what distance goes with a length."""
HALF = 0.5
"""Of the error goes to each family."""
CAP = 4
"""A query keeps at most so many times the rung's length."""
SHORTER = 0.9
"""Stopping per query is taken for shortlists of at most this share: it selects from a longer one."""


def calibrated(
    snapshot: Snapshot, queries_QD: Float32s | None, plan: Plan, k: int, recall: object, confidence: object
) -> Promise:
    """The promise of the shortest shortlists of `plan` that reach the target; nothing is changed.

    Args:
        queries_QD: unit rows of full width; None asks a sample of the items, each without itself among the answers.

    Raises:
        InputError: too few queries (says how many are needed), a target out of reach (says what is reachable), or no
            more items than k, so that there is nothing to choose.
    """
    items = snapshot.state.live
    if items <= k + (queries_QD is None):
        raise InputError(
            f"the index holds {items} items and k is {k}: every search finds them all, so there is nothing to "
            "calibrate; add items or ask for fewer answers"
        )
    own: Rows | None = None
    shuffled = np.random.default_rng(SEED).permutation(np.flatnonzero(snapshot.live))
    if queries_QD is None:
        own = np.sort(shuffled[:ITEMS_ASKED])
        queries_QD = snapshot.vectors.take(own)
        shuffled = shuffled[ITEMS_ASKED:]
    target, sure = check_target(recall, confidence, len(queries_QD))
    view = View(snapshot)
    found = recalls_of(view, queries_QD, k, own)
    ladder = ladder_of(plan, k, items, view.width)
    several = len(ladder) > 1 and len(shuffled) >= PROFILED and len(queries_QD) >= needed(target, shared(sure, HALF))
    chosen, measured = smallest(ladder, found, target, sure, HALF if several else 1.0)
    asked = k if own is None else k + 1
    length = float(lengths(chosen, queries_QD, asked, view).mean())
    if several:
        stop = stopping(view, snapshot.vectors.take(np.sort(shuffled[:PROFILED])), plan, k, items)
        with suppress(InputError):  # out of reach for this family alone
            rung, recalls = smallest(sizes(k, items), lambda n: found(stop(n)), target, sure, HALF)
            mean = float(lengths(stop(rung), queries_QD, asked, view).mean())
            if mean <= SHORTER * length:
                chosen, measured, length = stop(rung), recalls, mean
    return Promise(
        chosen, target, sure, len(queries_QD), k, items, float(measured.mean()), lower_bound(measured, sure),
        "queries" if own is None else "items", round(length, 1),
    )  # fmt: skip


def stopping(source: Source, items_PD: Float32s, plan: Plan, k: int, items: int) -> Callable[[int], Plan]:
    """Length -> the plan in which each query stops by itself where items keep so many rows, half of them fewer.

    The shortlists of a query are nested along the lengths, so its recall does not fall. Later stages keep what they
    would keep behind a shortlist of that length.

    Args:
        items_PD: vectors of a few items, none of them asked as queries; each finds itself, which is left out.
    """
    first = plan.stages[0]

    @cache
    def at(length: int) -> Plan:
        fixed = with_keep(plan, length, k)
        if length + 2 >= items:
            return fixed
        scan = source.scan(replace(first, keep=None, within=None), items_PD, length + 1)
        falls = [np.partition(s, -k - 1)[-k - 1] - s.min() for s, _ in scan if s is not None and len(s) > k]
        fall = min(max(float(np.median(falls)) if falls else WIDEST, NARROWEST), WIDEST)
        keep = max(length, min(CAP * length, items - 1))
        stage = replace(fixed.stages[0], keep=keep, within=float(f"{fall:.4g}"))
        return Plan((stage, *fixed.stages[1:]))

    return at


def ladder_of(plan: Plan, k: int, items: int, full: int) -> list[Plan]:
    """The plan with shortlists from k to all items; those of later stages keep their share of the first one's.

    With one shortlist the recall of a query cannot fall along it. With several it may, by the few rows that a longer
    first shortlist adds in front of a true answer in the second.
    """
    first = plan.stages[0]
    if len(plan.stages) == 1 and first == Stage(full, "float32"):
        return [plan]
    return [with_keep(plan, n, k) for n in sizes(k, items)]


def with_keep(plan: Plan, keep: int, k: int) -> Plan:
    """The plan whose first shortlist has `keep` rows, later ones their share of it but at least k."""
    first = plan.stages[0]
    stages = [replace(first, keep=keep, within=None)]
    for stage in plan.stages[1:]:
        if stage.keep is not None:
            share = stage.keep / (first.keep or stage.keep)
            stage = replace(stage, keep=min(stages[-1].keep or keep, max(k, round(keep * share))))
        stages.append(stage)
    return Plan(tuple(stages))


def recalls_of(source: Source, queries_QD: Float32s, k: int, own: Rows | None = None) -> Callable[[Plan], Floats]:
    """Plan -> recall@k of every query, by running it.

    An answer counts when its exact score reaches that of the k-th best item, so that equal vectors stand for one
    another. With `own`, query q is row own[q] and that row counts neither as an answer nor as a true one.
    """
    asked = k if own is None else k + 1
    best = _without(run(Plan((Stage(source.width, "float32"),)), queries_QD, asked, source), own, k)
    edges = np.array([scores[-1] if len(scores) else np.inf for scores in best])
    k = min(k, *(len(scores) for scores in best)) if len(best) else k

    def found(plan: Plan) -> Floats:
        answers = _without(run(plan, queries_QD, asked, source), own, k)
        hits = [np.count_nonzero(scores >= edge) for scores, edge in zip(answers, edges, strict=True)]
        return np.asarray(hits, dtype=np.float64) / k

    return found


def note(promise: Promise | None, plan: Plan, k: int, items: int, filtered: bool) -> str:
    """What is promised of a search, in one line, and what is not."""
    if promise is None:
        return "nothing is promised: the index has not been calibrated; see Index.calibrate"
    if plan != promise.plan:
        return f"nothing is promised of this plan; '{promise.plan}' was calibrated"
    doubts = []
    if k != promise.k:
        doubts.append(f"this search asks for {k}")
    if items > promise.items:
        doubts.append(f"the index has grown to {items} items since, calibrate again")
    if filtered:
        doubts.append("this search has a filter, which it does not cover")
    return f"{promise}" + ("; but " + ", and ".join(doubts) if doubts else "")


def _without(answers: list[tuple[Rows, Float32s]], own: Rows | None, k: int) -> list[Float32s]:
    """The scores of the k best answers, those of a query's own row left out."""
    if own is None:
        return [scores for _, scores in answers]
    return [scores[rows != mine][:k] for (rows, scores), mine in zip(answers, own, strict=True)]
