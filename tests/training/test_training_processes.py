"""Training in several processes: the same result as in one, one set of files, and the same bits after a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import matryo as mt
from matryo.core.errors import InputError
from matryo.training import TrainConfig, train
from matryo.training.trainer import checkpoints

SCRIPT = Path(__file__).with_name("several_trainers.py")
SMALL = {"static": {"width": 32, "vocabulary": 500}, "batch_size": 40, "epochs": 2, "save_steps": 2}


@pytest.fixture
def trainers(python, tmp_path):
    """Run jobs in several processes each; their exit statuses, and what they wrote to standard error."""

    def run(jobs, count=2):
        file = tmp_path / "jobs.json"
        file.write_text(json.dumps(jobs, default=str))
        ran = python(SCRIPT, count, file)
        assert ran.stdout, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1]), ran.stderr

    return run


def tensors(folder) -> dict[str, np.ndarray]:
    found = load_file(folder / "model.safetensors")
    head = folder / "head.safetensors"
    return found | (load_file(head) if head.is_file() else {})


def assert_close(one, two, tolerance=2e-4):
    """Equal up to the order of sums, which Adam makes visible in rows of tiny gradients."""
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    for name in first:
        off = np.abs(first[name] - second[name])
        assert off.mean() < tolerance, (name, off.mean(), off.max())


def test_two_processes_give_what_one_gives(trainers, row_files, tmp_path):
    """Candidates, comparisons, heads and learned numbers reach across processes; the batch is the same, only shared."""
    runs = {
        "info_nce": {"pairs": row_files["pairs"], "symmetric": True, "loss_args": {"learn": "temperature"}},
        "cosent": {"pairs": row_files["scored"], "loss": "cosent", "sample_widths": 2},
        "cross_entropy": {"pairs": row_files["labelled"], "loss": "cross_entropy", "loss_args": {"tied": True}},
        "supcon": {"pairs": row_files["labelled"], "loss": "supcon"},
        "guided_info_nce": {"pairs": row_files["pairs"], "loss": "guided_info_nce", "teacher": "toy"},
        "several": {
            "data": [
                {"path": row_files["pairs"], "name": "pairs"},
                {"path": row_files["scored"], "loss": "cosent", "weight": 0.5},
                {"path": row_files["labelled"], "loss": "cross_entropy", "name": "classes"},
            ],
        },
    }
    jobs = [{"config": {**SMALL, **options, "out": tmp_path / "two" / name}} for name, options in runs.items()]
    statuses, said = trainers(jobs)
    assert statuses == [[0, 0]] * len(jobs), said
    for name, options in runs.items():
        train(TrainConfig(**{**SMALL, **options, "out": tmp_path / "one" / name}))
        assert_close(tmp_path / "one" / name, tmp_path / "two" / name)
        assert not [path for path in (tmp_path / "two" / name).rglob("*") if path.name.startswith(".")]
        model = mt.load(tmp_path / "two" / name)
        assert model.encode(["mail server"], width=8).shape == (1, 8)


def test_killed_processes_resume_to_the_same_bits(trainers, row_files, dev_folder, tmp_path):
    several = [
        {"path": row_files["pairs"], "name": "pairs"},
        {"path": row_files["labelled"], "loss": "cross_entropy", "name": "classes"},
    ]
    options = {**SMALL, "data": several, "dev": dev_folder, "patience": 50}
    jobs = []
    for name, kills in (("whole", [None]), ("killed", [3, 9, 13, None])):
        for n, kill in enumerate(kills):
            jobs.append({"config": {**options, "out": tmp_path / name / "model"}, "resume": n > 0, "kill": kill})
    statuses, said = trainers(jobs)
    assert statuses == [[0, 0], [-9, -9], [-9, -9], [-9, -9], [0, 0]], said
    for file in ("model.safetensors", "head.safetensors", "matryo.safetensors", "matryo.json"):
        assert (tmp_path / "killed" / "model" / file).read_bytes() == (
            tmp_path / "whole" / "model" / file
        ).read_bytes(), file


def test_checkpoints_hold_one_random_state_a_process(trainers, row_files, tmp_path):
    out = tmp_path / "model"
    trainers([{"config": {**SMALL, "pairs": row_files["pairs"], "out": out}, "kill": 7}])
    found = checkpoints(out / "checkpoints")
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-6"]
    for path in found:
        assert {"random_0.json", "random_1.json"} <= {file.name for file in path.iterdir()}
        mt.load(path)
    with pytest.raises(InputError, match=r"cannot resume .*: processes changed since it was started"):
        train(TrainConfig(**{**SMALL, "pairs": row_files["pairs"], "out": out}), resume=True)


def test_mistakes_of_several_processes(trainers, row_files, tmp_path):
    plain = {**SMALL, "pairs": row_files["pairs"], "out": tmp_path / "model"}
    jobs = [
        {"config": {**plain, "batch_size": 41}},
        {"config": {**plain, "batch_size": 400}},
        {"config": plain, "differently": {"1": {"seed": 7}}},
    ]
    statuses, said = trainers(jobs)
    assert statuses == [[2, 2]] * 3
    assert "batch_size 41 counts the rows of all processes together and must be a multiple of their number, 2" in said
    assert "try 40" in said
    assert "batch_size 400 is more than the 200 rows of a data set; lower it" in said
    assert "processes disagree on the configuration: process 1 differs from process 0 (config.seed" in said
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_processes_resume_to_the_same_bits_again_and_again(trainers, row_files, tmp_path, seed):
    rng = np.random.default_rng(seed)
    options = {**SMALL, "pairs": row_files["pairs"], "epochs": 6, "no_duplicates": True, "seed": seed}
    jobs = [{"config": {**options, "out": tmp_path / "whole" / "model"}}]
    for n in range(4):
        for k, kill in enumerate([*sorted(rng.choice(np.arange(3, 30), 3, replace=False).tolist()), None]):
            jobs.append(
                {"config": {**options, "out": tmp_path / f"killed-{n}" / "model"}, "resume": k > 0, "kill": kill}
            )
    statuses, said = trainers(jobs)
    assert statuses == [[0, 0], *([[-9, -9]] * 3 + [[0, 0]]) * 4], said
    for n in range(4):
        for file in ("model.safetensors", "matryo.json"):
            one, two = (tmp_path / name / "model" / file for name in ("whole", f"killed-{n}"))
            assert one.read_bytes() == two.read_bytes(), (n, file)


@pytest.mark.slow
def test_adapters_of_a_transformer_in_mini_batches_on_two_processes(trainers, minilm, debian_rows, tmp_path):
    """Dropout draws on every process, the dev set is measured by both, one writes; killed, resumed, the same."""
    file = tmp_path / "pairs.jsonl"
    rows = [{"anchor": row["anchor"], "positive": row["positive"][:60]} for row in debian_rows[:24]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"pairs": file, "dev": file, "base": str(minilm), "widths": [64, 384], "batch_size": 12, "epochs": 2}
    options |= {"device": "cpu", "save_steps": 1, "lora": 4, "learning_rate": 1e-3, "mini_batch_size": 4}
    jobs = [
        {"config": {**options, "out": tmp_path / name / "model"}, "kill": kill, "resume": resume}
        for name, kill, resume in (("whole", None, False), ("killed", 3, False), ("killed", None, True))
    ]
    statuses, said = trainers(jobs)
    assert statuses == [[0, 0], [-9, -9], [0, 0]], said
    for file in ("model.safetensors", "matryo.json"):
        one, two = (tmp_path / name / "model" / file for name in ("whole", "killed"))
        assert one.read_bytes() == two.read_bytes(), file


@pytest.mark.slow
def test_ctrl_c_on_torchrun_keeps_a_checkpoint_of_the_same_step(row_files, tmp_path):
    """The terminal sends it to every process, and torchrun once more to those it started."""
    options = tmp_path / "small.yaml"
    options.write_text("static: {width: 32, vocabulary: 500}\nbatch_size: 20\nepochs: 400\nsave_steps: 1000\n")
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "matryo", "train"]
    line += [row_files["pairs"], "--config", options, "--out", tmp_path / "model"]
    ran = subprocess.Popen([sys.executable, *map(str, line)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    said = ""
    while "step 20/" not in said:
        more = ran.stderr.readline()
        assert more, said
        said += more
    os.killpg(ran.pid, signal.SIGINT)
    said += ran.communicate(timeout=60)[1]
    assert said.count("matryo: interrupted; finished steps are kept in") == 2
    (kept,) = checkpoints(tmp_path / "model" / "checkpoints")
    assert {"random_0.json", "random_1.json"} <= {file.name for file in kept.iterdir()}
    mt.load(kept)
