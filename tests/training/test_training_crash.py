"""A training process that is killed, or asked to stop, and goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from matryo.cli import run
from matryo.training.trainer import checkpoints

KILLER = Path(__file__).with_name("kill_trainer.py")


def killed(python, tmp_path, pairs_file, dev_folder, rounds, seed):
    ran = python(KILLER, pairs_file, dev_folder, tmp_path, rounds, seed)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_killed_training_resumes_to_the_same_bits(python, tmp_path, pairs_file, dev_folder):
    counts = killed(python, tmp_path, pairs_file, dev_folder, rounds=4, seed=1)
    assert counts["kills"] >= 4
    assert counts["resumed"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_training_resumes_to_the_same_bits_again_and_again(python, tmp_path, pairs_file, dev_folder, seed):
    counts = killed(python, tmp_path, pairs_file, dev_folder, rounds=15, seed=100 + seed)
    assert counts["kills"] >= 15


def test_ctrl_c_keeps_a_checkpoint_and_resume_gives_the_same_bits(tmp_path, pairs_file, capsys):
    yaml = tmp_path / "small.yaml"
    yaml.write_text("static: {width: 32, vocabulary: 500}\nbatch_size: 20\nepochs: 30\n")
    line = ["train", str(pairs_file), "--config", str(yaml), "--out", str(tmp_path / "model")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "matryo", *line],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    said = ""
    while "step 20/" not in said:
        more = child.stderr.readline()
        assert more, said
        said += more
    child.send_signal(signal.SIGINT)
    rest, answer = child.stderr.read(), child.stdout.read()
    child.wait(timeout=60)
    child.stderr.close()
    child.stdout.close()
    assert child.returncode == 130
    assert answer == ""
    last = rest.splitlines()[-1]
    assert last.startswith("matryo: interrupted; finished steps are kept in")
    assert last.endswith("--resume")
    assert "Traceback" not in said + rest
    assert "\x1b" not in said + rest
    assert "\r" not in said + rest
    kept = checkpoints(tmp_path / "model" / "checkpoints")
    assert kept
    assert not (tmp_path / "model" / "matryo.json").exists()
    assert not [path for path in kept[0].parent.iterdir() if path.name.startswith(".")]

    assert run(line) == 2
    assert "holds an unfinished run; go on with --resume" in capsys.readouterr().err
    assert run([*line, "--resume"]) == 0
    line[-1] = str(tmp_path / "whole")
    assert run(line) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "whole"))
    assert one == two
