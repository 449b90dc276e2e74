"""Layers x widths: training, the folder, encoding, evaluation and export of a small transformer of four layers."""

import json

import numpy as np
import pytest
import torch

import matryo as mt
from matryo import Nesting
from matryo.cli import run
from matryo.core.depths import DepthNesting, DepthSampler
from matryo.core.errors import InputError
from matryo.core.records import Retrieval
from matryo.encoders import load
from matryo.encoders.layers import Layers
from matryo.encoders.sentence_transformer import SentenceTransformerEncoder
from matryo.encoders.smaller import export_smaller
from matryo.losses import nested_distill, nested_info_nce
from matryo.training import train
from matryo.training.objective import NestedObjective, Part

WIDTHS = (8, 16, 32)
TEXTS = ["a puzzle game for the terminal", "mail server", "a library for sounds of every kind", "fonts"]


@pytest.fixture(scope="module")
def base(small_bert):
    return small_bert


@pytest.fixture
def config(config, base):
    def make(out="model", **options):
        plain = {"base": str(base), "widths": WIDTHS, "epochs": 1, "learning_rate": 1e-3, "save_steps": None}
        return config(out, **{**plain, **options})

    return make


def objective(base, depths, **options):
    model = SentenceTransformerEncoder.load(str(base), "cpu").model.eval()
    part = Part("info_nce", {"temperature": 0.05}, Nesting(WIDTHS))
    return NestedObjective(model, Nesting(WIDTHS), {"pairs": part}, depths=depths, **options)


def features(model):
    return [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])]


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_the_objective_is_the_sum_over_depths_of_cut_encoders(base, mini_batch_size):
    depths = DepthNesting.of([1, 3, 4], Nesting(WIDTHS), [0.5, 1, 2], align=0.3)
    made = objective(base, depths, mini_batch_size=mini_batch_size)
    total, found = made(features(made.model), None)
    total.backward()
    mine = {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}

    slow = SentenceTransformerEncoder.load(str(base), "cpu")
    slow.model.eval()
    whole = [slow.model(f)["sentence_embedding"] for f in features(slow.model)]
    expected = torch.zeros(())
    for depth, weight in zip(depths.depths, depths.weights, strict=True):
        low = slow.at(depth).model.eval()
        own = [low(f)["sentence_embedding"] for f in features(low)]
        expected = expected + weight * nested_info_nce(*own, nesting=Nesting(WIDTHS), temperature=0.05)
        if depth < 4:
            target = torch.cat([x.detach() for x in whole])
            expected = expected + weight * 0.3 * nested_distill(
                torch.cat(own), target, nesting=Nesting(WIDTHS), kind="kl", temperature=0.3
            )
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    theirs = {name: p.grad for name, p in slow.model.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5, msg=name)
    assert list(found) == [1, 3, 4]


def test_drawn_depths_change_from_step_to_step(base):
    depths = DepthNesting.of([1, 2, 3, 4], Nesting(WIDTHS))
    made = objective(base, DepthSampler(depths, 2, seed=0))
    drawn = [tuple(made(features(made.model), None, step=step)[1]) for step in range(6)]
    assert all(len(d) == 2 and d[-1] == 4 for d in drawn)
    assert len(set(drawn)) > 1


def test_pairs_of_depth_and_width_train_no_other_widths(base):
    depths = DepthNesting.of([2, 4], Nesting(WIDTHS), widths=[[8], [8, 32]], align=0)
    made = objective(base, depths)
    _, found = made(features(made.model), None)
    assert [nesting.widths for nesting, _ in found.values()] == [(8,), (8, 32)]


def test_the_folder_says_its_depths_and_encodes_at_each(two_depths, base):
    model = load(two_depths, "cpu")
    assert model.depths == (2, 4)
    assert {row["depth"] for row in model.card.depth_scores} == {2}
    assert [row["width"] for row in model.card.depth_scores] == list(WIDTHS)
    low = model.encode(TEXTS, width=16, depth=2)
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(two_depths), device="cpu")
    plain[0].auto_model.encoder.layer = plain[0].auto_model.encoder.layer[:2]
    expected = plain.encode(TEXTS, truncate_dim=16, normalize_embeddings=True)
    np.testing.assert_allclose(low, expected, atol=1e-6)
    np.testing.assert_array_equal(model.encode(TEXTS, depth=4), model.encode(TEXTS))
    assert np.abs(model.encode(TEXTS, depth=2) - model.encode(TEXTS)).max() > 1e-3
    assert model.at(2).card.scores[0]["width"] == 8
    for depth in (1, 3, 5, 0):
        with pytest.raises(InputError, match=rf"depth {depth} was not trained; this model has depths \[2, 4\]"):
            model.encode(TEXTS, depth=depth)
    with pytest.raises(InputError, match="int8 ranges for all its layers, not for 2"):
        model.encode(TEXTS, depth=2, code="int8")


def test_an_interrupted_run_goes_on_to_the_same_weights(config):
    options = {"depths": {"depths": (1, 2, 4), "sample": 2}, "layers": (1, 4, 3, 4), "save_steps": 2}
    whole = train(config("whole", **options))

    class StoppedError(Exception):
        pass

    def stop(step):
        if step.step == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config("cut", **options), report=stop)
    again = train(config("cut", **options), resume=True)
    np.testing.assert_array_equal(whole.encode(TEXTS, depth=2), again.encode(TEXTS, depth=2))


def test_losses_of_every_depth_are_reported(config):
    seen = []
    train(config(depths="all", batch_size=10), report=lambda step: step.losses and seen.append(step.data))
    assert {"depth 1", "depth 2", "depth 3", "depth 4"} <= set(seen)


def test_training_starts_from_chosen_layers(config, base):
    """At a rate of next to nothing what is written is what was chosen."""
    options = {"layers": (1, 4, 3), "depths": (2, 3), "learning_rate": 1e-12, "max_steps": 1}
    model = train(config("chosen", **options))
    assert model.depths == (2, 3)
    chosen = Layers(SentenceTransformerEncoder.load(str(base), "cpu").model).choose((1, 4, 3))
    np.testing.assert_allclose(model.encode(TEXTS), chosen.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS, depth=2), Layers(chosen).cut(2).encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (1, 5)}, "a layer must be a whole number in 1..4, the encoder's layers; got 5"),
        ({"layers": ()}, "layers must name at least one of the encoder's 4"),
        ({"layers": (1, 3), "depths": (2, 4)}, "the depths end at 4 but the encoder has 2 layers"),
        ({"layers": (1, 3), "base": None}, "a static encoder has no layers"),
        ({"layers": (1, 3), "rotate": "learned"}, "turn the base first"),
        ({"layers": (1, 3), "blend": 0.5}, "chosen layers mean little before they are trained"),
        ({"depths": (2, 6)}, "the depths end at 6 but the encoder has 4 layers; end them with 4"),
        ({"depths": (2, 3)}, "the depths end at 3 but the encoder has 4 layers"),
        ({"depths": {"depths": (2, 4), "widths": ((8,), (8, 16))}}, "the last depth must train the full width 32"),
        ({"depths": {"depths": (2, 4), "widths": ((8,),)}}, "2 depths need 2 lists of widths, got 1"),
        ({"depths": {"depths": (2, 4), "sample": 3}}, "keep must be an integer in 2..2"),
        ({"depths": {"sample": 1}}, "depths: sample: .* greater than or equal to 2, got 1"),
        ({"depths": {"alignment": "l1"}}, "depths: alignment: .*'kl', 'cosine', 'mse', 'similarity' or 'neighbours'"),
        ({"depths": {"depth": 2}}, "allowed: depths, weights, widths, sample, align"),
        ({"depths": (2, 4), "base": None}, "a static encoder has no layers"),
        (
            {"depths": {"depths": (2, 4), "widths": ((8,), (32,))}, "sample_widths": 2},
            "both choose the widths; drop one",
        ),
    ],
)
def test_what_is_refused_leaves_nothing_behind(config, options, said, tmp_path):
    with pytest.raises(InputError, match=said):
        train(config("refused", **options))
    assert not (tmp_path / "refused").exists()


def test_pairs_and_a_head_do_not_go_together(config, row_files):
    options = {"pairs": row_files["labelled"], "loss": "cross_entropy"}
    with pytest.raises(InputError, match="loss 'cross_entropy' has a head of full width; leave the widths of each"):
        train(config(depths={"depths": (2, 4), "widths": ((8,), (8, 16, 32))}, **options))


def test_other_losses_at_several_depths(config, row_files):
    for loss in ("cosent", "cross_entropy", "triplet"):
        kind = {"cosent": "scored", "cross_entropy": "labelled", "triplet": "triplets"}[loss]
        model = train(config(loss, pairs=row_files[kind], loss=loss, depths=(2, 4), max_steps=2))
        assert model.depths == (2, 4)


def test_evaluate_fills_the_grid(two_depths, dev_folder, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert run(["eval", str(two_depths), str(dev_folder), "--split", "dev", "--report", str(page), "--resamples", "50",
                 "--codes", "float32", "--json"]) == 0  # fmt: skip
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["metric"] == "nDCG@10"]
    grid = {(row["depth"], row["width"]): row["value"] for row in rows if row["model"].startswith(str(two_depths))}
    assert {depth for depth, _ in grid} == {None, 2}
    model = load(two_depths, "cpu")
    low = mt.evaluate((*(model.encode(t, depth=2) for t in _texts(dev_folder)),), _task(dev_folder), WIDTHS)
    assert {row.width: row.value for row in low.select(model="vectors") if row.width in WIDTHS} == {
        width: value for (depth, width), value in grid.items() if depth == 2 and width in WIDTHS
    }
    assert run(["eval", str(two_depths), str(dev_folder), "--split", "dev", "--keep", "0.3", "--codes", "int8"]) == 0
    assert "keeps 30% (lower bound): " in capsys.readouterr().err
    text = page.read_text()
    assert "Depth and width" in text
    assert "2 layers" in text
    assert run(["eval", str(two_depths), str(dev_folder), "--split", "dev", "--depths", "3"]) == 2
    assert "depth 3 is not among the model's depths; the model offers [2, 4]" in capsys.readouterr().err


def _task(folder) -> Retrieval:
    from matryo.evaluation import read_task

    return read_task(folder, "dev")


def _texts(folder):
    task = _task(folder)
    return task.queries, task.texts


def test_export_of_a_sub_network_is_a_plain_folder(two_depths, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    out = tmp_path / "small"
    assert run(["export", str(two_depths), "--depth", "2", "--width", "16", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["depth"], said["layers"], said["width"]) == (2, 4, 16)
    assert said["difference"] < 1e-5
    assert said["speedup"] > 0
    model = load(two_depths, "cpu")
    expected = model.encode(TEXTS, width=16, depth=2)
    np.testing.assert_allclose(SentenceTransformer(str(out), device="cpu").encode(TEXTS), expected, atol=1e-5)
    made = load(out, "cpu")
    assert (made.width, made.nesting.widths, made.depths) == (16, (8, 16), None)
    assert made.encoder.layers.count == 2
    np.testing.assert_allclose(made.encode(TEXTS, width=8), model.encode(TEXTS, width=8, depth=2), atol=1e-5)
    assert made.card.training["cut"]["depth"] == 2
    with pytest.raises(InputError, match="is there already"):
        export_smaller(two_depths, out, depth=2)
    with pytest.raises(InputError, match=r"depth 3 was not trained; this model has depths \[2, 4\]"):
        export_smaller(two_depths, tmp_path / "other", depth=3)
    assert run(["export", str(two_depths), "--depth", "2", "--onnx", str(tmp_path / "x")]) == 2
    assert "--depth writes a sentence-transformers folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_export_of_the_whole_width(two_depths, tmp_path):
    found = export_smaller(two_depths, tmp_path / "low", depth=2, texts=TEXTS)
    assert found["width"] == 32
    assert len(load(tmp_path / "low", "cpu").encoder.model) == 3


def test_command_line_takes_depths(base, pairs_file, tmp_path, capsys):
    common = ["train", str(pairs_file), "--base", str(base), "--widths", "8,32", "--batch-size", "40"]
    for n, (text, expected) in enumerate([("2,4", (2, 4)), ("all", (1, 2, 3, 4)), ("{depths: [3, 4]}", (3, 4))]):
        out = tmp_path / str(n)
        assert run([*common, "--max-steps", "1", "--depths", text, "--out", str(out)]) == 0
        assert load(out).depths == expected
    chosen = [
        "--layers",
        "1,4",
        "--depths",
        "1,2",
        "--precision",
        "bfloat16",
        "--max-steps",
        "1",
        "--out",
        str(tmp_path / "chosen"),
    ]
    assert run([*common, *chosen]) == 0
    assert load(tmp_path / "chosen").encoder.layers.count == 2
    assert run([*common, "--layers", "1,x", "--out", str(tmp_path / "no")]) == 2
    assert "--layers takes numbers" in capsys.readouterr().err
    assert run([*common, "--depths", "two", "--out", str(tmp_path / "no")]) == 2
    assert "--depths takes numbers" in capsys.readouterr().err


def test_the_loss_for_other_trainers(base):
    """NestedLoss with depths is the objective of `matryo train`."""
    from matryo.training.modules import NestedLoss

    depths = DepthNesting.of([2, 4], Nesting(WIDTHS), align=0.5, alignment="cosine")
    made = objective(base, depths)
    expected, found = made(features(made.model), None)
    options = {"depths": depths, "temperature": 0.05}
    loss = NestedLoss(made.model, nested_info_nce, WIDTHS, **options)
    for other in (loss, NestedLoss(made.model, nested_info_nce, WIDTHS, mini_batch_size=2, **options)):
        torch.testing.assert_close(other(features(made.model)), expected, rtol=1e-5, atol=1e-5)
        assert list(other.values) == [2, 4]
        torch.testing.assert_close(other.values[2], found[2][1], rtol=1e-5, atol=1e-5)
    assert loss.get_config_dict()["depths"] == [2, 4]
    plain = NestedLoss(made.model, nested_info_nce, WIDTHS, depths=range(1, 5))
    assert plain.depths == DepthNesting.of([1, 2, 3, 4], Nesting(WIDTHS))
    with pytest.raises(InputError, match="the depths end at 3 but the encoder has 4 layers"):
        NestedLoss(made.model, nested_info_nce, WIDTHS, depths=[3])
    pairs = DepthNesting.of([2, 4], Nesting(WIDTHS), widths=[[8], [8, 32]])
    with pytest.raises(InputError, match="both choose the widths; drop one of the two"):
        NestedLoss(made.model, nested_info_nce, WIDTHS, depths=pairs, keep=2)
