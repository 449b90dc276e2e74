"""Choosing on the depth x width grid."""

import numpy as np
import pytest

import matryo as mt
from matryo.core.errors import InputError
from matryo.core.metrics import Judgements
from matryo.core.records import Retrieval

N = 60


class TwoDepths:
    """A model whose low depth is as good as the whole at 8 dimensions and more, and useless at 4."""

    name, width, depths = "two depths", 16, (2, 4)
    nesting = mt.Nesting([4, 8, 16])

    def encode(self, texts, depth=None):
        rows = []
        for text in texts:
            number = int(text.split()[1])
            rng = np.random.default_rng(number)
            row = rng.normal(size=16)
            if depth == 2 and text.startswith("query"):
                row[:4] = np.random.default_rng(1000 + number).normal(size=4) * 0.2
            rows.append(row)
        return np.array(rows, np.float32)


@pytest.fixture
def report():
    judged = Judgements(np.arange(N), np.arange(N), np.ones(N), N)
    ids = [str(n) for n in range(N)]
    task = Retrieval("t", [f"query {n}" for n in range(N)], ids, [f"document {n}" for n in range(N)], ids, judged)
    return mt.evaluate(TwoDepths(), task, [4, 8, 16], codes=["float32", "int8"], baselines=(), resamples=200)


def test_fewest_layers_then_fewest_bytes(report):
    found = report.smallest(0.9)
    assert [row.depth for row in found] == [2, None]
    assert found[1].width == 4
    best = [row for row in report.select() if row.share_low >= 0.9]
    for row in found:
        assert row in best
        for other in best:
            fewer = (other.depth or 4) <= (row.depth or 4) and other.bytes <= row.bytes
            assert not fewer or other == row


def test_the_whole_model_keeps_all_of_itself(report):
    whole = report.select(model="two depths", code="float32")[-1]
    assert whole.width == 16
    found = report.smallest(1.0)
    assert found
    assert all(row.share_low == 1 and row.bytes <= whole.bytes for row in found)


@pytest.mark.parametrize("share", [0, 1.5, True, "0.9"])
def test_share_out_of_range(report, share):
    with pytest.raises(InputError, match="share must be above 0 and at most 1"):
        report.smallest(share)


def test_all_trained_depths_are_measured_unless_said(report):
    assert {row.depth for row in report.rows} == {None, 2}
    none = mt.evaluate(TwoDepths(), _small(), [4, 16], depths=(), baselines=(), resamples=50)
    assert {row.depth for row in none.rows} == {None}


def _small():
    judged = Judgements(np.arange(4), np.arange(4), np.ones(4), 4)
    ids = [str(n) for n in range(4)]
    return Retrieval("t", [f"query {n}" for n in range(4)], ids, [f"document {n}" for n in range(4)], ids, judged)
