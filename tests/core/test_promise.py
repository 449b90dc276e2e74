"""What the promise's statistics must hold: level, order, reach, and the walk they stand for."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryo.core.errors import InputError
from matryo.core.plan import Plan
from matryo.core.promise import Promise, check_target, lower_bound, needed, p_value, sizes, smallest

recalls = st.lists(st.integers(0, 10), min_size=1, max_size=60).map(lambda found: np.array(found) / 10)
targets = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


def draw(kind, mean, size, rng):
    """Recalls with this mean: independent misses, queries of unequal difficulty, all or nothing."""
    if kind == "even":
        return rng.binomial(10, mean, size) / 10
    if kind == "uneven":
        return rng.binomial(10, rng.beta(8 * mean, 8 - 8 * mean, size)) / 10
    return (rng.random(size) < mean).astype(float)


@pytest.mark.parametrize("kind", ["even", "uneven", "all or nothing"])
@pytest.mark.parametrize(("target", "queries"), [(0.9, 100), (0.95, 300), (0.99, 1000)])
def test_at_the_edge_of_the_hypothesis_it_is_refuted_no_oftener_than_said(kind, target, queries):
    rng = np.random.default_rng([queries, len(kind)])
    refuted = sum(p_value(draw(kind, target, queries, rng), target, 0.9) <= 0.1 for _ in range(1000))
    assert refuted <= 100 + 3 * np.sqrt(1000 * 0.1 * 0.9)


@pytest.mark.parametrize("kind", ["even", "uneven", "all or nothing"])
def test_capital_is_one_in_expectation(kind):
    """The law behind the level, for a sample so small that the average over draws is sharp."""
    rng = np.random.default_rng(3)
    capital = [1 / p_value(draw(kind, 0.8, 3, rng), 0.8, 0.6) for _ in range(20000)]
    # 1 / p is at least 1 by its cap, so compare where the capital is above it only.
    assert np.mean([c for c in capital if c > 1]) * np.mean(np.array(capital) > 1) <= 1.02


@given(recalls, targets, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_more_recall_never_harms(found, target, random):
    order = list(range(len(found)))
    random.shuffle(order)
    p = p_value(found, target, 0.95)
    assert 0 < p <= 1
    assert p_value(found[order], target, 0.95) == p
    better = np.minimum(found + 0.1, 1)
    assert p_value(better, target, 0.95) <= p


@given(recalls)
def test_bound_is_below_the_mean_and_grows_with_doubt(found):
    bound = lower_bound(found, 0.95)
    assert 0 <= bound <= found.mean() + 1e-12
    assert lower_bound(found, 0.5) >= bound


def test_the_bound_covers_the_mean_as_often_as_said():
    rng = np.random.default_rng(5)
    for kind in ("even", "uneven", "all or nothing"):
        over = sum(lower_bound(draw(kind, 0.93, 200, rng), 0.9) > 0.93 for _ in range(200))
        assert over <= 20 + 3 * np.sqrt(200 * 0.09)


@given(targets, st.sampled_from([0.8, 0.95, 0.99]))
def test_needed_is_exactly_where_perfect_answers_begin_to_show_it(target, confidence):
    least = needed(target, confidence)
    assert p_value(np.ones(least), target, confidence) <= 1 - confidence
    assert least == 1 or p_value(np.ones(least - 1), target, confidence) > 1 - confidence


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 12), min_size=5, max_size=5), min_size=8, max_size=40),
    st.sampled_from([0.5, 0.8]),
)
def test_halving_stops_where_the_walk_from_the_top_does(ranks, target):
    """Slow twin: fixed sequence testing as it is written down."""
    at, ladder = np.array(ranks), list(range(1, 13))

    def found(rung):
        return (at < rung).mean(axis=1)

    walked = None
    for rung in reversed(ladder):
        if p_value(found(rung), target, 0.8) > 0.2:
            break
        walked = rung
    if walked is None:
        with pytest.raises(InputError, match="cannot be promised"):
            smallest(ladder, found, target, 0.8)
    else:
        chosen, values = smallest(ladder, found, target, 0.8)
        assert chosen == walked
        assert (values == found(walked)).all()


@pytest.mark.parametrize("kind", ["geometric", "two kinds of queries"])
def test_the_chosen_shortlist_keeps_the_promise_and_is_not_much_longer_than_it_must_be(kind):
    """The whole choice, simulated: ranks of the true answers, 300 samples, the exact expectation known."""
    rng, ladder = np.random.default_rng(11), sizes(10, 3000)
    # One rank parameter per query; P(rank < s) = 1 - q^s has a closed form, so the expectation is exact.
    pool = 1 / (1 + rng.gamma(1.5, 40, 4000)) if kind == "geometric" else rng.choice([0.2, 0.01], 4000, p=[0.7, 0.3])
    truth = np.array([(1 - (1 - pool) ** s).mean() for s in ladder])
    least = ladder[int(np.argmax(truth >= 0.95))]
    kept, chosen = 0, []
    for _ in range(300):
        ranks = rng.geometric(pool[rng.integers(0, 4000, 400)][:, None], (400, 10)) - 1
        rung, _ = smallest(ladder, lambda s, ranks=ranks: (ranks < s).mean(axis=1), 0.95, 0.95)
        chosen.append(rung)
        kept += truth[ladder.index(rung)] >= 0.95
    assert kept >= 300 * 0.95
    assert np.mean(chosen) <= 1.5 * least


def test_sizes_rise_by_about_a_tenth_and_hold_both_ends():
    found = sizes(10, 5000)
    assert (found[0], found[-1]) == (10, 5000)
    assert all(a < b <= 1.1 * a + 1 for a, b in pairwise(found))
    assert sizes(7, 7) == [7]
    with pytest.raises(InputError, match="at least 1 up, got 5 to 3"):
        sizes(5, 3)


def test_what_cannot_be_shown_is_refused_with_what_can():
    with pytest.raises(InputError, match=r"20 queries cannot show recall >= 0.95 .* it takes 65; give at least 65"):
        check_target(0.95, 0.95, 20)
    with pytest.raises(InputError, match="recall must be a number between 0 and 1, got 1; only an exact plan"):
        check_target(1, 0.95, 100)
    for bad in (0, -0.1, 1.5, "0.9", True, float("nan")):
        with pytest.raises(InputError, match="confidence must be a number between 0 and 1"):
            check_target(0.9, bad, 100)
    with pytest.raises(InputError, match=r"largest shortlist measured gives 0.9000 over 200 queries.* at least 0\.8"):
        smallest([1, 2], lambda _: np.full(200, 0.9), 0.95, 0.95)


def test_a_promise_reads_back_from_json():
    promise = Promise(Plan.parse("64:binary keep 90 > 128:float32"), 0.95, 0.9, 300, 10, 5000, 0.97, 0.951, "items")
    assert Promise.from_json(promise.as_json()) == promise
    assert "300 of its own items as queries on 5000 items" in str(promise)
