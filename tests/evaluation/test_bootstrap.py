import numpy as np
import pytest
from scipy import stats

from matryo.core.errors import InputError
from matryo.evaluation import bootstrap
from matryo.evaluation.bootstrap import Resampling, mean_draws, spearman, spearman_draws


def test_means_are_the_means_of_the_resamples():
    rng = np.random.default_rng(0)
    how = Resampling(30, resamples=50, seed=3)
    columns = [rng.random(30), rng.random(30)]
    counts = np.concatenate([c for _, c in how.counts()])
    assert counts.shape == (50, 30)
    assert (counts.sum(axis=1) == 30).all()
    for column, draws in zip(columns, mean_draws(columns, how), strict=True):
        expected = [np.repeat(column, row.astype(int)).mean() for row in counts]
        np.testing.assert_allclose(draws, expected)


def test_spearman_against_scipy_with_ties():
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b = rng.integers(0, 6, 40).astype(float), rng.random(40)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_draws_rank_anew_in_every_resample():
    rng = np.random.default_rng(2)
    how = Resampling(25, resamples=40)
    gold = rng.integers(0, 4, 25).astype(float)
    column = gold + rng.integers(0, 3, 25)
    counts = np.concatenate([c for _, c in how.counts()]).astype(int)
    expected = [stats.spearmanr(np.repeat(column, c), np.repeat(gold, c)).statistic for c in counts]
    np.testing.assert_allclose(spearman_draws([column], gold, how)[0], expected, atol=1e-12)


def test_blocks_change_nothing(monkeypatch):
    values = np.random.default_rng(3).random(100)
    whole = mean_draws([values], Resampling(100, 37))[0]
    monkeypatch.setattr(bootstrap, "BLOCK_ELEMENTS", 800)
    np.testing.assert_allclose(mean_draws([values], Resampling(100, 37))[0], whole)


def test_undefined_resamples_are_left_out():
    how = Resampling(3, 20)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))
    assert how.interval(np.array([np.nan, 1.0, 2.0])) == pytest.approx((1.025, 1.975))
    assert np.isnan(how.interval(np.array([np.nan]))).all()
    low, high = how.interval(spearman_draws([np.arange(3.0)], np.arange(3.0), how)[0])
    assert (low, high) == pytest.approx((1, 1))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    held = 0
    for n in range(300):
        values = rng.exponential(size=60)
        how = Resampling(60, 300, confidence=0.9, seed=n)
        low, high = how.interval(mean_draws([values], how)[0])
        held += low <= 1 <= high
    assert 0.82 <= held / 300 <= 0.95


def test_bad_settings():
    with pytest.raises(InputError, match="resamples must be"):
        Resampling(3, 1)
    with pytest.raises(InputError, match="between 0 and 1, got 95"):
        Resampling(3, confidence=95)
