"""Train in several processes, as torchrun would start them, and kill them on demand.

    python several_trainers.py PROCESSES JOBS.json

Each job is {"config": fields of TrainConfig, "resume": bool, "kill": step or null}: the processes of a job with "kill"
all get SIGKILL once the first one has reported that step. One process imports everything once and forks the trainers.
Writes one line of JSON to standard output: the exit statuses of each job's processes, negative for a signal.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch

from matryo.core.errors import MatryoError
from matryo.training import TrainConfig, processes, train


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def child(rank: int, count: int, port: int, job: dict, steps: int) -> int:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    torch.set_num_threads(1)
    config = {**job["config"], **job.get("differently", {}).get(str(rank), {})}
    try:
        train(
            TrainConfig(**config),
            resume=job.get("resume", False),
            report=lambda step: os.write(steps, step.step.to_bytes(4, "big")),
        )
    except MatryoError as error:
        sys.stderr.write(f"{rank}: {error}\n")
        return 2
    processes.leave()
    return 0


def start(rank: int, count: int, port: int, job: dict, steps: int) -> int:
    made = os.fork()
    if made:
        return made
    status = 1
    try:
        status = child(rank, count, port, job, steps)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(count: int, job: dict) -> list[int]:
    """The exit status of each process."""
    port, (reading, steps) = free_port(), os.pipe()
    children = [start(rank, count, port, job, steps) for rank in range(count)]
    os.close(steps)
    while said := os.read(reading, 4):
        if int.from_bytes(said, "big") == job.get("kill"):
            for one in children:
                os.kill(one, signal.SIGKILL)
    os.close(reading)
    return [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[2]).read_text())
    sys.stdout.write(json.dumps([run(int(sys.argv[1]), job) for job in jobs]) + "\n")
