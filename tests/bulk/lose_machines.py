"""Encode on a Ray cluster of several machines (raylets on loopback) that loses a worker, then a machine.

    python lose_machines.py MODEL CORPUS PLAIN CLUSTER

PLAIN gets what one process makes, CLUSTER what the cluster makes meanwhile. Writes one line of JSON to standard output:
what was lost in the middle of which part, and what else was refused.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil
import ray
from ray.cluster_utils import Cluster

from matryo.bulk import Bulk, Ray, embed
from matryo.core.errors import MatryoError

STORE = 80 << 20
OPTIONS = Bulk(width=16, code="int8", part_rows=800)


def writers(out: Path) -> dict[int, str]:
    """Living processes that have a part's temporary file in the making, and the part."""
    found = {}
    for path in out.glob(".part-*.tmp"):
        name, process = path.name[1:].rsplit(".", 3)[0], int(path.name.rsplit(".", 3)[-3])
        if psutil.pid_exists(process):
            found[process] = name
    return found


def wait_for(find, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.005)
    raise SystemExit("waited in vain")


def descendants(node) -> set[int]:
    raylet = node.all_processes["raylet"][0].process.pid
    return {child.pid for child in psutil.Process(raylet).children(recursive=True)}


def lose_one_of_each(cluster: Cluster, node, out: Path, lost: dict) -> None:
    """SIGKILL to one worker while it writes, then to a whole other machine while a worker of it writes."""
    theirs = descendants(node)
    worker, part = wait_for(lambda: [x for x in writers(out).items() if x[0] not in theirs])[0]
    os.kill(worker, signal.SIGKILL)
    lost["worker"] = part
    _, part = wait_for(lambda: [x for x in writers(out).items() if x[0] in theirs and x[1] != part])[0]
    cluster.remove_node(node, allow_graceful=False)
    lost["machine"] = part


def refusal(*given, **more) -> list[str]:
    try:
        embed(*given, **more)
    except MatryoError as error:
        return [type(error).__name__, str(error)]
    return []


def started(tries: int = 3):
    """A head without processors and two machines of one each. On a busy machine Ray may give up starting."""
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=STORE)
        return cluster, *(cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2))
    except Exception:
        cluster.shutdown()
        if tries == 1:
            raise
    return started(tries - 1)


def main(model: str, corpus: Path, plain: Path, out: Path) -> None:
    embed(model, [corpus], plain, OPTIONS)
    cluster, first, second = started()
    assert first.all_processes["raylet"][0].process.pid != second.all_processes["raylet"][0].process.pid
    lost: dict[str, str] = {}
    torn: list[str] = []

    def report(step) -> None:
        if step.parts == 2:
            lose_one_of_each(cluster, second, out, lost)
            torn.extend(sorted(path.name for path in out.glob(".part-*.tmp")))

    embed(model, [corpus], out, OPTIONS, ray=Ray(address=cluster.address), report=report)
    assert not ray.is_initialized()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    on = {"ray": Ray(address="auto")}
    refused = {
        "text": refusal(model, [corpus.parent / "refused.parquet"], out.parent / "refused", OPTIONS, **on),
        "gpu": refusal(model, [corpus], out.parent / "gpu", OPTIONS, ray=Ray(address="auto", gpus=1)),
    }
    ours = ray.is_initialized()
    ray.shutdown()
    cluster.shutdown()
    sys.stdout.write(json.dumps({"lost": lost, "torn": torn, "refused": refused, "left alone": ours}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
