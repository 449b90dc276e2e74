"""Models trained again by a model's own recipe, at one width alone."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import matryo as mt
from matryo.core.errors import InputError
from matryo.evaluation import train_alone
from matryo.evaluation.alone import alone
from matryo.training import StaticConfig, TrainConfig

SMALL = {"static": StaticConfig(width=32, vocabulary=500), "epochs": 2, "batch_size": 40}


@pytest.fixture
def model(pairs_file, dev_folder, tmp_path):
    """A model with pairs of its own, which a test may change."""
    pairs = shutil.copy(pairs_file, tmp_path / "pairs.jsonl")
    return mt.train(TrainConfig(pairs=pairs, out=tmp_path / "model", dev=dev_folder, **SMALL))


def test_each_width_alone_is_the_same_recipe_run_for_it(model, pairs_file, dev_folder, tmp_path):
    steps = []
    made = train_alone(model, report=lambda width, step: steps.append((width, step.step)))
    assert list(made) == list(model.nesting.widths) == [8, 16, 32]
    assert {width for width, _ in steps} == set(made)
    small = SMALL | {"static": StaticConfig(width=8, vocabulary=500)}
    by_hand = mt.train(TrainConfig(pairs=pairs_file, out=tmp_path / "hand", widths=(8,), dev=dev_folder, **small))
    np.testing.assert_array_equal(made[8].encode(["mail reader"]), by_hand.encode(["mail reader"]))
    # They lie beside the model and are used again.
    steps.clear()
    again = train_alone(mt.load(tmp_path / "model"), [8], tmp_path / "model-alone", lambda *step: steps.append(step))
    assert not steps
    np.testing.assert_array_equal(again[8].encode(["chess"]), made[8].encode(["chess"]))
    report = mt.evaluate(model, dev_folder, separate=made, twins={"un-nested, cut": made[32]}, resamples=20)
    assert [row.width for row in report.select(model="trained at one width")] == [8, 16, 32]
    twin = report.select(model="un-nested, cut")
    assert [(row.width, row.trained) for row in twin] == [(8, False), (16, False), (32, True)]


def test_an_unfinished_run_goes_on(model, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(width, step):
        if step.step == 7:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_alone(model, [16], tmp_path / "out", stop)
    steps = []
    one = train_alone(model, [16], tmp_path / "out", lambda _, step: steps.append(step.step))[16]
    assert min(steps) == 6, "the first epoch of five steps was kept"
    two = train_alone(model, [16], tmp_path / "whole")[16]
    np.testing.assert_array_equal(one.encode(["mail"]), two.encode(["mail"]))


def test_an_encoder_of_given_width_keeps_it_and_trains_its_first_dimensions_only(trained, pairs_file, tmp_path):
    static = StaticConfig(tokenizer=trained / "tokenizer.json", vectors=trained / "model.safetensors")
    given = {"static": static, "temperature": (0.1, 0.2, 0.3), "widths": (8, 16, 32), "batch_size": 40, "epochs": 1}
    model = mt.train(TrainConfig(pairs=pairs_file, out=tmp_path / "given", **given))
    made = train_alone(model, [8])[8]
    assert made.encode(["mail reader"]).shape == (1, 8)
    assert made.model.card.training["config"]["temperature"] == [0.1, 0.1]
    before = load_file(trained / "model.safetensors")["embedding.weight"]
    after = load_file(tmp_path / "given-alone" / "8" / "model.safetensors")["embedding.weight"]
    np.testing.assert_array_equal(after[:, 8:], before[:, 8:])
    assert np.abs(after[:, :8] - before[:, :8]).max() > 1e-3


def test_what_belongs_to_a_width_follows_it(tmp_path):
    recipe = TrainConfig(
        pairs="p",
        out="o",
        dev="d",
        widths=(8, 16, 32),
        weights=(1, 2, 3),
        temperature=(0.1, 0.2, 0.3),
        best=16,
        **SMALL,
    )
    got = alone(recipe, 12, 32, tmp_path)
    assert (got.widths, got.weights, got.temperature, got.best, got.static.width) == ((12,), None, 0.2, "mean", 12)
    based = TrainConfig(pairs="p", out="o", dev="d", base="b", widths=(8, 32), best="mean")
    got = alone(based, 8, 32, tmp_path)
    assert (got.widths, got.weights, got.best, got.base) == ((8, 32), (1, 0), 8, "b")
    assert alone(based, 32, 32, tmp_path).widths == (32,)
    assert alone(based.model_copy(update={"best": "last"}), 8, 32, tmp_path).best == "last"
    several = [{"path": "q", "loss": "cosent", "loss_args": {"scale": [1, 2, 3], "learn": "scale"}}, {"path": "r"}]
    mixed = TrainConfig(data=several, out="o", base="b", widths=(8, 16, 32), sample_widths=2)
    got = alone(mixed, 16, 32, tmp_path)
    assert [one.loss_args for one in got.data] == [{"scale": [2, 2], "learn": "scale"}, {}]
    assert got.sample_widths is None
    for update in ({}, {"dev": None}):
        assert alone(recipe.model_copy(update=update), 32, 32, tmp_path).best == "mean"


def test_what_cannot_be_trained_again_is_refused_before_anything_is(model, tmp_path):
    def refused(said, **more):
        with pytest.raises(InputError, match=said) as caught:
            train_alone(mt.load(tmp_path / "model"), **{"out": tmp_path / "out", **more})
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    with pytest.raises(InputError, match="toy does not say how it was trained; train for one width with"):
        train_alone(mt.load("toy"))
    refused(r"width 33 is outside 1\.\.32", widths=[8, 33])
    other = tmp_path / "other"
    train_alone(model, [8], other)
    card = json.loads((other / "8" / "matryo.json").read_text())
    card["training"]["config"]["seed"] = 5
    (other / "8" / "matryo.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=r"holds a model of another recipe than .*model's; choose another folder"):
        train_alone(model, [8, 16], other)
    assert not (other / "16").exists()
    pairs = tmp_path / "pairs.jsonl"
    content = pairs.read_text()
    pairs.write_text(content + "\n")
    refused("pairs.jsonl has changed since .*model was trained on it")
    pairs.unlink()
    refused("was trained on .*pairs.jsonl, which is not there; put it back, or train for one width")
