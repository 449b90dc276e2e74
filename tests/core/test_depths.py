import numpy as np
import pytest

from matryo import Nesting
from matryo.core.depths import DepthNesting, DepthSampler
from matryo.core.errors import InputError

WIDTHS = Nesting([8, 16, 32], [1, 2, 3])


def test_every_width_at_every_depth_unless_said():
    depths = DepthNesting.of([2, 4, 6], WIDTHS)
    assert depths.weights == (1, 1, 1)
    assert depths.nestings == (WIDTHS,) * 3
    assert (depths.deepest, len(depths)) == (6, 3)


def test_fixed_pairs_keep_the_weights_of_their_widths():
    depths = DepthNesting.of([2, 4], WIDTHS, widths=[[16], [8, 32]])
    assert [n.widths for n in depths.nestings] == [(16,), (8, 32)]
    assert [n.weights for n in depths.nestings] == [(2,), (1, 3)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"depths": []}, "depths must be integers >= 1, at least one, got"),
        ({"depths": [0, 2]}, "depths must be integers >= 1"),
        ({"depths": [True, 2]}, "depths must be integers >= 1"),
        ({"depths": [4, 2]}, r"depths must rise strictly, got \[4, 2\]; try \[2, 4\]"),
        ({"weights": [1.0]}, "2 depths need 2 weights, got 1"),
        ({"weights": [1.0, 0.0]}, "the last depth must have a weight above 0"),
        ({"widths": [[8]]}, "2 depths need 2 lists of widths, got 1"),
        ({"widths": [[8], [16]]}, r"the last depth must train the full width 32, got \[16\]"),
        ({"widths": [[9], [32]]}, r"width 9 of a depth is not among the trained widths \[8, 16, 32\]"),
        ({"align": -1}, "align must be finite and >= 0"),
        ({"temperature": 0}, "temperature must be finite and above 0"),
    ],
)
def test_what_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        DepthNesting.of(**{"depths": [2, 4], "nesting": WIDTHS, **given})


def test_depths_that_do_not_fit_the_encoder():
    with pytest.raises(InputError, match=r"end at 6 but the encoder has 4 layers; end them with 4, .*\[2, 4\]"):
        DepthNesting.of([2, 6], WIDTHS).check(4)


def test_drawn_depths_are_right_on_average():
    depths = DepthNesting.of([1, 2, 3, 4], WIDTHS, [1, 2, 0, 4], widths=[[8], [16], [8, 16], [32]])
    sampler, steps = DepthSampler(depths, 2, seed=5), 4000
    sums = dict.fromkeys(depths.depths, 0.0)
    for step in range(steps):
        drawn = sampler.draw(step)
        assert drawn.deepest == 4
        assert len(drawn) == 2
        for depth, weight, nesting in zip(drawn.depths, drawn.weights, drawn.nestings, strict=True):
            sums[depth] += weight
            assert nesting == depths.nestings[depth - 1]
    np.testing.assert_allclose([s / steps for s in sums.values()], [1, 2, 0, 4], atol=0.1)
    assert sampler.draw(3) == DepthSampler(depths, 2, seed=5).draw(3)


def test_too_few_to_draw():
    with pytest.raises(InputError, match=r"keep must be an integer in 2..3 .* each shorter depth"):
        DepthSampler(DepthNesting.of([1, 2, 3], WIDTHS), 1)
