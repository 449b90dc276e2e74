"""The promise: the smallest shortlist whose expected recall on new queries reaches a target, shown from a sample.

Recall lies in [0, 1] and does not fall as the shortlist grows. So "the expected recall is below the target" is tested
shortlist by shortlist, from the largest down, and the last one for which it is refuted is chosen. Testing in an order
fixed beforehand keeps the chance of any wrong refutation at 1 - confidence, however many shortlists there are (Learn
then Test, Angelopoulos et al. 2021, arXiv 2110.01052, section 4, fixed sequence testing; with a recall that only rises
this is also the risk control of Bates et al. 2021, arXiv 2101.02703).

The test is a bet (Waudby-Smith & Ramdas 2023, Estimating means of bounded random variables by betting, arXiv
2010.09686). The promise is about the expectation over new queries of the same source, drawn independently.

Letters in array names: Q queries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.plan import Plan

Floats = NDArray[np.float64]
T = TypeVar("T")

SPREADS = tuple(np.geomspace(1 / 12, 1, 4).tolist())
"""Variances betted on, as shares of target (1 - target), which is the largest there is: about 1/k when the k answers
are missed independently, 1 when a query finds all or nothing."""
STAKE = 0.9
"""Share of the capital a bet may lose on one query that finds nothing."""
STEP = 1.1
"""Ratio of neighbouring shortlist sizes."""


@dataclass(frozen=True)
class Promise:
    """What was promised, and from what.

    With `confidence` over the draw of the sample, the expected recall@k of `plan` on new queries of the same source is
    at least `recall`, for an index that holds what it held then.
    """

    plan: Plan
    recall: float
    confidence: float
    queries: int
    k: int
    items: int
    """Items in the index when it was made. More items need a longer shortlist: calibrate again when it has grown."""
    measured: float
    """Mean recall@k over the sample."""
    bound: float
    """What the sample shows of the expected recall at this confidence: at least `recall`."""
    source: str = "queries"
    """"queries", or "items" where held-out items were asked instead."""
    shortlist: float | None = None
    """Mean candidates a query that the stages hand on, over the sample. None in promises made before it was noted."""

    def __str__(self) -> str:
        asked = f"{self.queries} queries" if self.source == "queries" else f"{self.queries} of its own items as queries"
        length = "" if self.shortlist is None else f", {self.shortlist:.0f} candidates a query"
        return (
            f"expected recall@{self.k} >= {self.recall:g} at confidence {self.confidence:g}, "
            f"from {asked} on {self.items} items (measured {self.measured:.4f}, at least {self.bound:.4f}{length})"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return {**asdict(self), "plan": str(self.plan)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Promise":
        """A promise from what `as_json` gave."""
        return cls(**{**content, "plan": Plan.parse(content["plan"])})


def p_value(recalls_Q: Floats, target: float, confidence: float) -> float:
    """Evidence against "the expected recall is below `target`": small means it is refuted.

    A bettor stakes a share l of the capital on every query beating the target; under the hypothesis the capital
    prod(1 + l (x - target)) is 1 in expectation at most, so it reaches 1 / p with probability p at most
    (Waudby-Smith & Ramdas 2023, section 4). The best l depends on the unknown variance: the capital is spread evenly
    over the best stakes for four of them. No order of the queries enters: the same sample in another order gives the
    same plan, and queries drawn from a pool without being put back are covered too (Hoeffding 1963, theorem 4, on the
    logarithms).
    """
    return float(_p_values(recalls_Q, np.array([target]), confidence)[0])


def lower_bound(recalls_Q: Floats, confidence: float) -> float:
    """The expected recall is at least this, with this confidence: every smaller target is refuted by `p_value`.

    To 1/2000, and downwards: targets are refuted from 0 up until one is not.
    """
    targets = np.arange(1, 2000) / 2000
    stands = _p_values(recalls_Q, targets, confidence) > 1 - confidence
    first = int(np.argmax(stands)) if stands.any() else len(targets)
    return float(targets[first - 1]) if first else 0.0


def needed(target: float, confidence: float) -> int:
    """The fewest queries that could refute "below target" if every one of them found everything."""
    most = 1
    while _perfect(most, target, confidence) > 1 - confidence:
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if _perfect(middle, target, confidence) <= 1 - confidence else (middle, most)
    return most


def check_target(target: object, confidence: object, queries: int) -> tuple[float, float]:
    """Target and confidence as floats, if so many queries can show them at all."""
    recall, sure = _share("recall", target), _share("confidence", confidence)
    least = needed(recall, sure)
    if queries < least:
        raise InputError(
            f"{queries} queries cannot show recall >= {recall:g} at confidence {sure:g}: even if each of them "
            f"found everything it takes {least}; give at least {least}, better {4 * least}, or ask for less"
        )
    return recall, sure


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        advice = "; only an exact plan such as '768:float32' promises 1" if value == 1 and name == "recall" else ""
        raise InputError(f"{name} must be a number between 0 and 1, got {value!r}{advice}")
    return float(value)


def smallest(
    ladder: Sequence[T], recalls: Callable[[T], Floats], target: float, confidence: float, share: float = 1.0
) -> tuple[T, Floats]:
    """The lowest rung for which, and for every rung above it, "expected recall below target" is refuted; its recalls.

    The recall of a query must not fall along the ladder. The p-values then do not rise, and halving the ladder finds
    the rung that a walk from the top would stop at, having looked at a few rungs only.

    Args:
        ladder: shortlists, ascending, chosen without looking at recalls.
        recalls: rung -> (Q,) recall of every query, in [0, 1].
        share: of the error 1 - confidence that this ladder may spend, where several are tried.

    Raises:
        InputError: too few queries for any answer, or not even the last rung will do; says what is reachable.
    """
    looked: dict[int, Floats] = {}
    sure = shared(confidence, share)

    def passes(rung: int) -> bool:
        looked[rung] = recalls(ladder[rung])
        return p_value(looked[rung], target, sure) <= 1 - sure

    low, high = -1, len(ladder)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    if high == len(ladder):
        best = looked[high - 1]
        shown = lower_bound(best, sure)
        raise InputError(
            f"recall >= {target:g} cannot be promised at confidence {confidence:g}: the largest shortlist measured "
            f"gives {best.mean():.4f} over {len(best)} queries, which shows at least {shown:.4f}; "
            "ask for that, give more queries, or take a finer code or a wider prefix"
        )
    return ladder[high], looked[high]


def shared(confidence: float, share: float) -> float:
    """The confidence left to one of several choices that each spend a share of the error."""
    return 1 - (1 - confidence) * share


def sizes(least: int, most: int) -> list[int]:
    """Shortlist sizes from `least` to `most`, each about a tenth larger than the one before; both ends included."""
    if not 1 <= least <= most:
        raise InputError(f"shortlists go from at least 1 up, got {least} to {most}")
    found = [least]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, round(found[-1] * STEP))))
    return found


def _perfect(queries: int, target: float, confidence: float) -> float:
    """`p_value` of so many queries that found everything."""
    return float(_capital(np.ones(1), np.array([queries]), np.array([target]), confidence)[0])


def _p_values(recalls_Q: Floats, targets_T: Floats, confidence: float) -> Floats:
    return _capital(*np.unique(recalls_Q, return_counts=True), targets_T, confidence)


def _capital(values: Floats, counts: NDArray[np.int64], targets_T: Floats, confidence: float) -> Floats:
    """(T,) one over what the bettor ends with, at most 1, when `counts[i]` queries had recall `values[i]`.

    The stake against a variance v over n queries is sqrt(2 log(1 / (1 - confidence)) / (n v)), their equation 26.
    """
    queries, even = int(counts.sum()), targets_T * (1 - targets_T)
    odds = -2 * math.log(1 - confidence)
    stakes_ST = np.minimum(np.sqrt(odds / (queries * np.multiply.outer(SPREADS, even))), STAKE / targets_T)
    logs_ST = np.log1p(stakes_ST[..., None] * (values - targets_T[:, None])) @ counts
    most_T = logs_ST.max(axis=0)
    ends: Floats = np.exp(np.minimum(0.0, -most_T - np.log(np.exp(logs_ST - most_T).mean(axis=0))))
    return ends
