import random
from collections import Counter
from math import comb, fsum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import matryo as mt
from matryo.core.sampling import WidthSampler


@st.composite
def samplers(draw):
    widths = sorted(draw(st.sets(st.integers(1, 2048), min_size=1, max_size=7)))
    weights = draw(
        st.lists(st.floats(0, 10, allow_subnormal=False), min_size=len(widths), max_size=len(widths)).filter(any)
    )
    pool = sum(weight > 0 for weight in weights[:-1])
    keep = draw(st.integers(min(2, pool + 1), pool + 1))
    return WidthSampler(mt.Nesting(widths, weights), keep, draw(st.integers(0, 2**63)))


@given(samplers())
def test_weights_are_unbiased_over_all_subsets(sampler):
    outcomes = list(sampler.outcomes())
    for width, weight in sampler.nesting:
        drawn = [dict(outcome).get(width, 0.0) for outcome in outcomes]
        assert fsum(drawn) / len(outcomes) == pytest.approx(weight, rel=1e-12)


@given(samplers(), st.integers(0, 2**63))
def test_a_draw_is_an_outcome_with_the_full_width_and_keep_widths(sampler, step):
    drawn = sampler.draw(step)
    assert drawn.D == sampler.nesting.D
    assert drawn.weights[-1] == sampler.nesting.weights[-1]
    assert len(drawn) == sampler.keep
    assert drawn in list(sampler.outcomes())


@given(samplers(), st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_a_draw_depends_on_seed_and_step_alone(sampler, steps):
    before = [sampler.draw(step) for step in steps]
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    random.seed(1)
    other = WidthSampler(sampler.nesting, sampler.keep, sampler.seed)
    assert [other.draw(step) for step in reversed(steps)] == before[::-1]


def test_every_subset_is_about_equally_frequent():
    sampler = WidthSampler(mt.Nesting([1, 2, 3, 4, 5, 6]), keep=3, seed=5)
    count = Counter(sampler.draw(step).widths for step in range(6000))
    expected = 6000 / comb(5, 2)
    assert len(count) == comb(5, 2)
    # Chi-square of 9 degrees of freedom stays below 27.9 with probability .999; the seed is fixed.
    assert sum((n - expected) ** 2 / expected for n in count.values()) < 27.9


def test_seeds_differ():
    nesting = mt.Nesting([1, 2, 3, 4, 5, 6])
    draws = [[WidthSampler(nesting, 3, seed).draw(step) for step in range(20)] for seed in (0, 1)]
    assert draws[0] != draws[1]


def test_a_width_of_weight_zero_is_never_drawn_but_the_full_width_stays():
    sampler = WidthSampler(mt.Nesting([2, 4, 8, 16], [1.0, 0.0, 2.0, 0.0]), keep=2)
    assert {o.widths for o in sampler.outcomes()} == {(2, 16), (8, 16)}
    assert all(o.weights[-1] == 0 for o in sampler.outcomes())


def test_keeping_everything_changes_nothing():
    nesting = mt.Nesting([2, 4, 8], [1.0, 0.5, 2.0])
    assert {WidthSampler(nesting, 3).draw(step) for step in range(5)} == {nesting}
    alone = mt.Nesting([8])
    assert WidthSampler(alone, 1).draw(0) == alone


@pytest.mark.parametrize("keep", [0, 1, 5, -2, True, 2.0])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=r"keep must be an integer in 2\.\.4 for .*, got .*always one of them"):
        WidthSampler(mt.Nesting([2, 4, 8, 16, 32], [1, 1, 0, 1, 1]), keep)


def test_keep_of_a_single_width():
    with pytest.raises(ValueError, match=r"keep must be an integer in 1\.\.1"):
        WidthSampler(mt.Nesting([8]), 2)


def test_seed_and_step_are_counts():
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        WidthSampler(mt.Nesting([4, 8]), 2, -1)
    with pytest.raises(ValueError, match=r"step must be an integer >= 0, got 1\.5"):
        WidthSampler(mt.Nesting([4, 8]), 2).draw(1.5)
