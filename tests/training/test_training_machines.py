"""Two machines, as torchrun sees them: two agents that meet on loopback, one process each. One process is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from matryo.training.trainer import checkpoints

TRAINERS = Path(__file__).with_name("several_trainers.py")
EXAMPLES = Path(__file__).parents[2] / "examples" / "several_machines"
SMALL = {"static": {"width": 32, "vocabulary": 500}, "batch_size": 20, "epochs": 12, "save_steps": 8}


class Machines:
    """The agents of one run, which share a folder."""

    def __init__(self, *arguments: object) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        words += ["--master-addr", "127.0.0.1", "--master-port", port]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.agents = [
            subprocess.Popen(
                [sys.executable, *words, "--node-rank", str(rank), "-m", "matryo", "train", *map(str, arguments)],
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in (0, 1)
        ]
        self.said = ""

    def kill_second_at(self, words: str) -> None:
        """SIGKILL to the process of the second machine once the first has said so."""
        while words not in self.said:
            more = self.agents[0].stderr.readline()
            assert more, self.said
            self.said += more
        started = psutil.Process(self.agents[1].pid).children(recursive=True)
        (trainer,) = [one for one in started if "matryo" in one.cmdline()]
        os.kill(trainer.pid, signal.SIGKILL)

    def end(self) -> list[int]:
        """Both exit statuses; `said` then holds all that the first machine said."""
        try:
            self.said += self.agents[0].communicate(timeout=240)[1]
            self.agents[1].communicate(timeout=60)
        finally:
            for agent in self.agents:
                agent.kill()
        return [agent.returncode for agent in self.agents]


@pytest.mark.slow
def test_a_lost_machine_stops_the_others_and_the_run_goes_on_to_the_same_bits(python, pairs_file, tmp_path):
    yaml = tmp_path / "small.yaml"
    yaml.write_text(json.dumps(SMALL))
    line = [pairs_file, "--config", yaml, "--out", tmp_path / "lost"]
    machines = Machines(*line)
    machines.kill_second_at("step 40/")
    assert all(machines.end())
    (told,) = [one for one in machines.said.splitlines() if one.startswith("matryo: ")]
    assert told.startswith("matryo: another of the 2 processes is gone (")
    assert told.endswith("start all of them again with the same command and --resume")
    assert "this is a bug in matryo" not in machines.said
    assert checkpoints(tmp_path / "lost" / "checkpoints")
    assert not (tmp_path / "lost" / "matryo.json").exists()

    machines = Machines(*line, "--resume")
    assert machines.end() == [0, 0], machines.said
    assert "step 10/" not in machines.said, "it went on from the checkpoint"

    jobs = tmp_path / "jobs.json"
    job = {"config": {**SMALL, "pairs": str(pairs_file), "out": str(tmp_path / "whole")}}
    jobs.write_text(json.dumps([job]))
    ran = python(TRAINERS, 2, jobs)
    assert ran.stdout.splitlines()[-1] == "[[0, 0]]", ran.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("lost", "whole"))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name


STANDINS = {
    "scontrol": 'echo "$@" >> "$LOG"\n[ "$1" = show ] && printf "n1\\nn2\\n"\nexit 0',
    "srun": 'shift\nfor n in 0 1; do SLURM_NODEID=$n "$@" || exit 1; done',
    "torchrun": 'echo "torchrun $*" >> "$LOG"\nexit "${FAIL:-0}"',
}
"""Commands that say what they were asked, as there is no Slurm here."""
TRAIN = "-m matryo train pairs.parquet --config train.yaml --out out"


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("resuming", [False, True])
def test_the_slurm_file_numbers_the_machines_and_resumes(tmp_path, failing, resuming):
    for name, what in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{what}\n")
        (tmp_path / name).chmod(0o755)
    if resuming:
        (tmp_path / "out" / "checkpoints" / "checkpoint-8").mkdir(parents=True)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": "log", "OUT": "out", "FAIL": str(int(failing))}
    ran = subprocess.run(["bash", EXAMPLES / "slurm.sh"], cwd=tmp_path, env=os.environ | slurm | own, timeout=60)
    assert ran.returncode == int(failing)
    said = (tmp_path / "log").read_text().splitlines()
    more = " --resume" if resuming else ""
    where = "--nproc-per-node 8 --master-addr n1 --master-port 29500"
    machines = [f"torchrun --nnodes 2 --node-rank {n} {where} {TRAIN}{more}" for n in (0, 1)]
    assert said == ["show hostnames n[1-2]", *([*machines[:1], "requeue 7"] if failing else machines)]
