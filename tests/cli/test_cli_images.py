import json

import numpy as np
import pytest
import torch
from PIL import Image

from matryo import load
from matryo.cli import run
from matryo.training import load_head


@pytest.fixture
def cli(capsys):
    """Run a command line in this process: (exit status, standard output, standard error)."""

    def go(*arguments):
        status = run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return go


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (place / label).mkdir()
        for n in range(8):
            pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + (100 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(place / label / f"{n}.png")
    return place


LINE = ("--dim", "16", "--widths", "4,16", "--epochs", "1", "--batch-size", "8", "--picture", "{size: 16}")


@pytest.mark.parametrize("task", ["classify", "contrast"])
def test_pictures_are_trained_and_loaded(cli, folder, tmp_path, task):
    status, said, err = cli("train", folder, "--task", task, "--out", tmp_path / "model", *LINE, "--json")
    assert status == 0, err
    assert json.loads(said)["widths"] == [4, 16]
    assert "epoch 1/1 loss 4:" in err
    files = sorted(folder.rglob("*.png"))
    assert load(tmp_path / "model").encode(files, width=4).shape == (16, 4)
    more = ("--base", tmp_path / "model", "--epochs", "1", "--widths", "4,8,16", "--loss-arg", "tied=true")
    if task == "classify":
        status, said, err = cli("train", folder, "--task", task, "--out", tmp_path / "more", *more)
        assert status == 0, err
        assert load(tmp_path / "more").nesting.widths == (4, 8, 16)


def test_broken_pictures_are_told(cli, folder, tmp_path):
    (tmp_path / "set" / "dark").mkdir(parents=True)
    (tmp_path / "set" / "dark" / "bad.png").write_bytes(b"broken")
    for file in sorted((folder / "dark").iterdir()):
        (tmp_path / "set" / "dark" / file.name).write_bytes(file.read_bytes())
    line = ("train", tmp_path / "set", "--task", "classify", "--out", tmp_path / "model")
    status, _, err = cli(*line, *LINE)
    assert status == 2
    assert "bad.png cannot be read as a picture" in err
    status, _, err = cli(*line, *LINE[:-1], "{size: 16, bad: skip}")
    assert status == 0, err
    assert "1 of 9 pictures skipped" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--task", "sort"), "--task must be classify or contrast, got 'sort'"),
        (("--task", "classify", "--temperature", "0.1"), "--temperature: not for pictures"),
        (("--task", "classify", "--precision", "half"), "precision must be float32 or bfloat16, got 'half'"),
        (("--task", "classify", "--warmup", "2"), "warmup in 0..1"),
        (("--task", "classify", "--picture", "{colour: red}"), "--picture takes size, pooling"),
        (("--task", "classify", "--picture", "{model_type: none}"), "model_type must be one of resnet"),
        (("--task", "classify", "--loss-arg", "beta=1"), "--loss-arg beta: with pictures it is tied"),
        (("--picture", "{size: 16}"), "--picture is for pictures: give --task"),
    ],
)
def test_mistakes(cli, folder, tmp_path, more, said):
    status, _, err = cli("train", folder, "--out", tmp_path / "model", *more)
    assert status == 2
    assert said in err
    assert not (tmp_path / "model").exists()


def test_a_configuration_file_says_what_options_would(cli, folder, tmp_path):
    """And what has no option; options win over it."""
    file = tmp_path / "train.yaml"
    plain = "widths: [4, 16]\ndim: 16\nepochs: 1\nbatch_size: 8\npicture: {size: 16}\n"
    file.write_text(plain + "loss_args: {label_smoothing: 0.1}\nseed: 3\n")
    line = ("train", folder, "--task", "classify", "--out")
    assert cli(*line, tmp_path / "a", "--config", file)[0] == 0
    assert cli(*line, tmp_path / "b", *LINE, "--loss-arg", "label_smoothing=0.1", "--seed", "3")[0] == 0
    files = sorted(folder.rglob("*.png"))
    one, two = (load(tmp_path / name).encode(files) for name in "ab")
    assert np.array_equal(one, two)
    file.write_text(plain + "weight_decay: 0.2\nseed: 3\n")
    assert cli(*line, tmp_path / "c", "--config", file, "--loss-arg", "label_smoothing=0.1", "--widths", "8,16")[0] == 0
    other = load(tmp_path / "c")
    assert other.nesting.widths == (8, 16)
    assert not np.array_equal(one, other.encode(files))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 1", "epoch: Extra inputs are not permitted, got 1; allowed: out, base, dim, widths"),
        ("epochs: ten", "epochs: Input should be a valid integer"),
        ("precision: float16", "precision: Input should be 'float32' or 'bfloat16', got 'float16'"),
        ("picture: {sise: 16}", "--picture takes size, pooling"),
        ("loss_args: {scale: 2}", "--loss-arg scale: with pictures it is tied or label_smoothing"),
        ("[1]", "expected a mapping of out, base"),
        (None, "no such file"),
    ],
)
def test_mistakes_in_a_configuration_file(cli, folder, tmp_path, text, said):
    file = tmp_path / "train.yaml"
    if text is not None:
        file.write_text(text)
    status, _, err = cli("train", folder, "--task", "classify", "--out", tmp_path / "m", "--config", file)
    assert (status, said in err) == (2, True), err
    assert not (tmp_path / "m").exists()


def test_pictures_are_measured_with_the_heads_they_were_trained_with(cli, folder, tmp_path):
    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        (tmp_path / "set" / split).symlink_to(folder)
    line = ("train", folder, "--task", "classify", "--out", tmp_path / "model", *LINE)
    assert cli(*line)[0] == 0
    ask = (
        "eval",
        tmp_path / "model",
        tmp_path / "set",
        "--codes",
        "float32",
        "--baselines",
        "none",
        "--resamples",
        "9",
    )
    status, said, err = cli(*ask, "--split", "val", "--json")
    assert status == 0, err
    rows = json.loads(said)["rows"]
    assert rows[0]["metric"] == "top-1", "what labelled sets are compared by unless said"
    found = {(row["metric"], row["width"]): row["value"] for row in rows}
    assert found["1-NN", 16] == 1, "each picture is among those it is compared with"
    head, classes = load_head(tmp_path / "model")
    vectors = load(tmp_path / "model").encoder.vectors(sorted(folder.rglob("*.png")), 16)
    labels = [classes.index(file.parent.name) for file in sorted(folder.rglob("*.png"))]
    for width in (4, 16):
        guesses = head(torch.from_numpy(vectors), width=width).argmax(1).numpy()
        assert found["head top-1", width] == np.mean(guesses == labels)
    status, _, err = cli(*ask)
    assert (status, "no pictures of the split test" in err) == (2, True)
    status, _, err = cli(*ask, "--split", "val", "--metric", "nDCG@10")
    assert (status, "'nDCG@10' is not measured on a labelled task" in err) == (2, True)
