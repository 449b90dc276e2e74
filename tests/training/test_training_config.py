"""Configurations that are refused: one line, and nothing written."""

import json

import pytest
import yaml

from matryo.core.errors import InputError, MatryoError
from matryo.training import StaticConfig, TrainConfig, train


def refused(work, said) -> None:
    with pytest.raises(InputError, match=said) as caught:
        work()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bach_size": 3}, "bach_size: Extra inputs are not permitted.*allowed: pairs, out, base"),
        ({"static": {"wide": 3}}, "wide: Extra inputs are not permitted.*allowed: width, vocabulary"),
        ({"static": {"width": 0}}, "width: .*greater than or equal to 1, got 0"),
        ({"static": {"vectors": "table.npy"}}, "vectors need the tokenizer"),
        ({"widths": [8, 8]}, r"widths must rise strictly, got \[8, 8\]; try \[8\]"),
        ({"widths": [0, 8]}, "widths must be integers >= 1, got 0"),
        ({"widths": "wide"}, "widths: .*got 'wide'"),
        ({"widths": [8, 32], "best": 16}, r"width 16 is not among the trained widths \[8, 32\]"),
        ({"weights": [1.0]}, "weights need widths"),
        ({"widths": [8, 32], "weights": [1.0]}, "2 widths need 2 weights, got 1"),
        ({"widths": [8, 32], "weights": [0, 0]}, "every weight is 0"),
        ({"epochs": -1}, "epochs: .*got -1"),
        ({"epochs": 0}, "0 epochs train nothing"),
        ({"batch_size": 1}, "batch_size: .*got 1"),
        ({"learning_rate": -1}, "learning_rate: .*got -1"),
        ({"temperature": 0}, "temperature must be finite and above 0, got 0.0"),
        ({"widths": [8, 32], "temperature": [0.1, float("nan")]}, "temperature must be finite and above 0"),
        ({"precision": "float8"}, "precision: .*'float32' or 'bfloat16'.*got 'float8'"),
        ({"metric": "accuracy"}, "unknown metric 'accuracy'; use one of nDCG@10"),
        ({"best": "first"}, "best"),
        ({"base": "toy", "static": {"width": 7}}, "static describes a new encoder, but base names an existing one"),
    ],
)
def test_configuration_dies_at_construction_and_from_yaml_alike(tmp_path, options, said):
    whole = {"pairs": "pairs.jsonl", "out": str(tmp_path / "model"), **options}
    refused(lambda: TrainConfig(**whole), said)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    refused(lambda: TrainConfig.from_yaml(tmp_path / "run.yaml"), said)
    assert not (tmp_path / "model").exists()


def test_what_is_required_is_named():
    refused(lambda: TrainConfig(out="model"), "pairs: Field required")


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "not YAML"), ("- 1", "expected a mapping of pairs, out"), ("", "map")]
)
def test_file_that_is_no_mapping(tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    refused(lambda: TrainConfig.from_yaml(tmp_path / "run.yaml"), said)
    refused(lambda: TrainConfig.from_yaml(tmp_path / "none.yaml"), "no such file")


def test_yaml_that_is_not_utf_8(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe")
    refused(lambda: TrainConfig.from_yaml(tmp_path / "run.yaml"), "run.yaml: not YAML")


def test_arguments_win_over_the_file_field_by_field(tmp_path):
    content = {"pairs": "a.jsonl", "out": "b", "epochs": 3, "static": {"vocabulary": 700}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    config = TrainConfig.from_yaml(tmp_path / "run.yaml", epochs=4, static={"width": 16})
    assert config.epochs == 4
    assert config.static == StaticConfig(width=16, vocabulary=700)


def test_configuration_is_frozen(tmp_path):
    config = TrainConfig(pairs="a.jsonl", out=tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"widths": (8, 16)}, r"nesting ends at width 16 but the vectors have 32 dimensions.*\[8, 16, 32\]"),
        ({"widths": (8, 64)}, r"ends at width 64 but the vectors have 32 dimensions"),
        ({"best": 9}, r"width 9 is not among the trained widths \[8, 16, 32\]"),
        ({"best": 8}, "needs a dev set"),
        ({"temperature": (0.1, 0.2)}, "2 values for 3 widths"),
        ({"dev": "nowhere.jsonl"}, "no such file: nowhere.jsonl"),
        ({"pairs": "nowhere.jsonl"}, "no such file: nowhere.jsonl"),
        ({"base": "./nowhere"}, "nowhere"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(config, options, said):
    refused(lambda: train(config(**options)), said)
    assert not config().out.exists()


def test_one_pair_is_not_enough(config, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"anchor": "a", "positive": "b"}))
    refused(lambda: train(config(pairs=tmp_path / "one.jsonl")), "at least 2 pairs, got 1")
    assert not config().out.exists()


def test_out_that_is_taken_is_left_alone(config, trained, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    refused(lambda: train(config(out=str(trained))), "already holds a trained model")
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    refused(lambda: train(config("mine")), "not empty and not a run of ours")
    refused(lambda: train(config("mine/notes.txt")), "is a file; choose a folder")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_resume_without_a_checkpoint(config):
    refused(lambda: train(config(), resume=True), "holds no checkpoint to resume from")
    assert not config().out.exists()


def test_unfinished_run_is_not_started_over(interrupted):
    made = interrupted()
    refused(lambda: train(made), "holds an unfinished run; go on with --resume")


def test_resume_as_another_run_names_what_changed(interrupted, config, debian_rows, pairs_file, tmp_path):
    made = interrupted()
    before = sorted(path.stat().st_mtime_ns for path in made.out.rglob("*"))
    refused(lambda: train(config(seed=1, epochs=3), resume=True), "epochs, seed changed since it was started")
    grown = tmp_path / "copy.jsonl"
    grown.write_text(pairs_file.read_text())
    other = made.model_copy(update={"out": tmp_path / "other", "pairs": grown})
    with pytest.raises(RuntimeError):
        train(other, report=_stop)
    grown.write_text(pairs_file.read_text() + json.dumps(debian_rows[250]) + "\n")
    refused(lambda: train(other, resume=True), "pairs changed since it was started")
    assert sorted(path.stat().st_mtime_ns for path in made.out.rglob("*")) == before


def test_a_run_of_a_version_without_a_setting_goes_on(interrupted):
    made = interrupted()
    path = made.out / "checkpoints" / "run.json"
    kept = json.loads(path.read_text())
    del kept["config"]["layers"]
    path.write_text(json.dumps(kept, indent=2))
    assert train(made, resume=True).nesting is not None
    assert not path.exists()


def _stop(step) -> None:
    if step.step == 3:
        raise RuntimeError("stopped by the test")


def test_every_refusal_is_of_one_family():
    assert issubclass(InputError, MatryoError)
    assert issubclass(InputError, ValueError)
