"""Losses of one's own, named `package.module:function`."""

import json

import pytest
import torch

import matryo as mt
from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses import nested_cosent, nested_info_nce
from matryo.training import TrainConfig, train, user_code
from matryo.training.objectives import recipe

CODE = """
import torch
from matryo.losses import nested_cosent

def contrast(anchors, candidates, *, sharpness: float = 20.0):
    return torch.nn.functional.cross_entropy(sharpness * anchors @ candidates.T, torch.arange(len(anchors)))

def ranked(first, second, scores, *, nesting, per_width=False):
    return nested_cosent(first, second, scores, nesting=nesting, per_width=per_width)

def by_class(rows, labels):
    same = labels[:, None] == labels[None]
    return (rows @ rows.T)[~same].mean() - (rows @ rows.T)[same].mean()

def apart(anchors, positives, negatives, *, margin=0.2):
    return ((anchors * negatives).sum(1) - (anchors * positives).sum(1) + margin).relu().mean()

def odd(a, b, c, d):
    return a.sum()

number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)


def test_kinds_and_values_are_those_of_the_functions():
    with user_code():
        kinds = {name: recipe(f"own_losses:{name}").rows for name in ("contrast", "ranked", "by_class", "apart")}
        contrast, ranked = (recipe(f"own_losses:{name}").call for name in ("contrast", "ranked"))
    assert kinds == {"contrast": "pairs", "ranked": "scored", "by_class": "labelled", "apart": "triplets"}
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 8, generator=make, dtype=torch.float64) for _ in range(2))
    nesting, scores = Nesting([2, 8], [1, 3]), torch.arange(9.0)
    for own, theirs in (
        (
            contrast(a, b, nesting=nesting, per_width=True, group=None),
            nested_info_nce(a, b, nesting=nesting, per_width=True),
        ),
        (
            ranked(a, b, scores, nesting=nesting, per_width=True),
            nested_cosent(a, b, scores, nesting=nesting, per_width=True),
        ),
    ):
        torch.testing.assert_close(own[0], theirs[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(own[1], theirs[1], rtol=1e-6, atol=0, check_dtype=False)


def test_trains_by_name_beside_ours(config, row_files):
    several = [
        {"path": row_files["pairs"], "loss": "own_losses:contrast", "loss_args": {"sharpness": 15}, "name": "own"},
        {"path": row_files["labelled"], "loss": "own_losses:by_class", "name": "classes"},
        {"path": row_files["scored"], "loss": "cosent", "name": "scored"},
    ]
    with user_code():
        made = config(pairs=None, data=several)
        model = train(made)
    assert model.card.training["config"]["data"][0]["loss"] == "own_losses:contrast"
    assert mt.load(made.out).encode(["mail server"], width=8).shape == (1, 8)


def test_nothing_is_imported_unless_allowed(config, tmp_path):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    said = "is code, and code is imported only if you allow it: give --user-code"
    with pytest.raises(InputError, match=said):
        config(loss="trap:loss")
    given = {"pairs": "p", "out": "o", "loss": "trap:loss"}
    for more, refused in (({}, said), ({"user_code": True}, "user_code: Extra inputs are not permitted")):
        (tmp_path / "run.yaml").write_text(json.dumps(given | more))
        with pytest.raises(InputError, match=refused):
            TrainConfig.from_yaml(tmp_path / "run.yaml")
    with user_code():
        config(loss="own_losses:contrast")
    with pytest.raises(InputError, match=said):
        config(loss="own_losses:contrast")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_losses:missing", r"cannot be imported \(.*missing.*\); write package.module:function"),
        ("no_such_module:loss", r"cannot be imported \(No module named 'no_such_module'\)"),
        ("own_losses:number", r"cannot be imported \(3 is not a callable object\)"),
        ("own_losses:odd", r"takes \(a, b, c, d\); allowed: two columns, three, one and labels, or two and scores"),
    ],
)
def test_functions_that_do_not_fit(config, name, said):
    with user_code(), pytest.raises(InputError, match=said):
        config(loss=name)


def test_arguments_are_checked(config):
    with user_code():
        with pytest.raises(InputError, match=r"loss 'own_losses:contrast' has no argument 'scale'; allowed: sharpness"):
            config(loss="own_losses:contrast", loss_args={"scale": 2})
        with pytest.raises(InputError, match="sharpness should be a valid number"):
            config(loss="own_losses:contrast", loss_args={"sharpness": "much"})
