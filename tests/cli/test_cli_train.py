"""`matryo train` with losses by name, several data sets and several processes, as a user would type it."""

import json
import os
import subprocess
import sys

import pytest

from matryo.cli import run


@pytest.fixture
def files(debian_rows, tmp_path):
    """Small files of rows, and the options of a tiny encoder."""
    rows = debian_rows[:80]
    made = {
        "pairs": rows,
        "labelled": [{"text": row["positive"], "label": ("games", "libs")[n % 2]} for n, row in enumerate(rows)],
        "scored": [{**rows[n - n % 2], "score": n % 2} for n in range(80)],
    }
    for name, content in made.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "small.yaml").write_text("static: {width: 32, vocabulary: 500}\nbatch_size: 20\nepochs: 3\n")
    return tmp_path


@pytest.fixture
def cli(capsys, files):
    """Train in this process: (exit status, standard output, standard error)."""

    def go(*arguments, out="model"):
        line = ["train", *map(str, arguments), "--config", str(files / "small.yaml"), "--out", str(files / out)]
        status = run(line)
        said = capsys.readouterr()
        return status, said.out, said.err

    return go


def recorded(files, out="model"):
    return json.loads((files / out / "matryo.json").read_text())["training"]


def test_a_loss_and_its_arguments(cli, files):
    line = [files / "labelled.jsonl", "--loss", "cross_entropy", "--loss-arg", "tied=true"]
    status, said, err = cli(*line, "--loss-arg", "label_smoothing=0.1", "--head-learning-rate", "0.05")
    assert status == 0, err
    assert said.endswith("a nested model of widths 8, 16, 32\n")
    assert "step 10/12 loss 8:" in err
    assert recorded(files)["config"]["loss_args"] == {"tied": True, "label_smoothing": 0.1}
    assert recorded(files)["classes"] == {"labelled": ["games", "libs"]}


@pytest.mark.parametrize(("task", "loss"), [("classify", "cross_entropy"), ("contrast", "supcon")])
def test_a_task_names_its_loss(cli, files, task, loss):
    status, _, err = cli(files / "labelled.jsonl", "--task", task)
    assert status == 0, err
    assert recorded(files)["config"]["loss"] == loss
    status, _, err = cli(files / "labelled.jsonl", "--picture", "{size: 8}", out="other")
    assert (status, "--picture is for pictures" in err) == (2, True)


def test_several_data_sets(cli, files):
    second = f"{{path: {files / 'scored.jsonl'}, loss: cosent, loss_args: {{scale: 10}}, weight: 0.5, name: sts}}"
    line = ["--data", files / "pairs.jsonl", "--data", second, "--no-duplicates", "--mixing", "round_robin"]
    status, _, err = cli(*line, "--sample-widths", 2)
    assert status == 0, err
    assert "step 10/24 pairs loss 8:" in err
    assert "step 10/24 sts loss 8:" in err
    config = recorded(files)["config"]
    assert [(one["loss"], one["weight"]) for one in config["data"]] == [("info_nce", 1.0), ("cosent", 0.5)]
    assert (config["no_duplicates"], config["mixing"], config["sample_widths"]) == (True, "round_robin", 2)


def test_options_of_the_file_give_way_to_those_of_the_line(cli, files):
    with (files / "small.yaml").open("a") as stream:
        stream.write("loss: triplet\nloss_args: {margin: 0.2}\n")
    status, _, err = cli(files / "pairs.jsonl", "--loss", "sigmoid", "--loss-arg", "scale=5")
    assert status == 0, err
    assert recorded(files)["config"]["loss_args"] == {"scale": 5}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss", "hinge"], "unknown loss 'hinge'; use one of info_nce"),
        (
            ["--loss-arg", "warmth=1"],
            "loss 'info_nce' has no argument 'warmth'; allowed: temperature, symmetric, learn",
        ),
        (["--loss-arg", "temperature=hot"], "temperature should be a valid number"),
        (["--loss-arg", "temperature"], "--loss-arg takes NAME=VALUE, for example temperature=0.05, got 'temperature'"),
        (["--loss-arg", "temperature=[1"], "--loss-arg takes NAME=VALUE"),
        (["--data", "x.jsonl"], "pairs is short for one data set; put its file into data and drop pairs"),
        (["--data", "{path: "], "--data takes a file, or a mapping such as '{path: sts.jsonl"),
        (["--mixing", "random"], "mixing: Input should be 'proportional' or 'round_robin'"),
        (["--patience", "2"], "patience needs a dev set"),
        (["--lora", "8"], "lora adapts a transformer; name one as base"),
        (["--lora", "{rank: 8}", "--base", "x"], "rank: Extra inputs are not permitted"),
        (["--mini-batch-size", "8"], "mini_batch_size saves activations, and a static encoder has none"),
        (["--loss", "distill"], "loss 'distill' needs a teacher"),
        (["--loss", "cross_entropy"], "no column 'text'; it has 'anchor', 'positive'"),
    ],
)
def test_mistakes(cli, files, options, said):
    status, out, err = cli(files / "pairs.jsonl", *options)
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("matryo: ")
    assert err.count("\n") == 1
    assert not (files / "model").exists()


def test_two_processes_by_torchrun(cli, files):
    """One answer, one set of progress lines, and the folder that one process gives."""
    line = ["train", files / "pairs.jsonl", "--config", files / "small.yaml", "--out", files / "two", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "matryo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [*torchrun, *map(str, line)], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["widths"] == [8, 16, 32]
    assert ran.stderr.count("step 10/12 loss") == 1
    status, _, err = cli(files / "pairs.jsonl", out="one")
    assert status == 0
    one, two = (next(part for part in said.splitlines() if "step 10/12" in part) for said in (err, ran.stderr))
    numbers = [[float(part.split(":")[1]) for part in line.split()[3:]] for line in (one, two)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)
