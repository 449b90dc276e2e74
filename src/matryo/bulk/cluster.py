"""The same parts on a Ray cluster: one task a part. Only names and counts travel; rows and vectors never do.

Ray does what it is good at: it starts workers, gives each its processors, and runs a task again elsewhere when its
worker or machine is lost. That a part run twice is there once is `encode_part`'s doing, not Ray's.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryo.bulk.encode import Record, encode_part, identity_of
from matryo.bulk.options import Bulk
from matryo.bulk.parts import Part
from matryo.core import errors
from matryo.core.errors import InputError, MatryoError, MissingExtraError, RemoteError, UnavailableError

if TYPE_CHECKING:
    from matryo.encoders import Model

Start = Callable[[str, dict[str, str], Sequence[Part], Bulk, Path], Iterator[Record]]
"""From a model's name and identity, parts, options and folder to records, in the order in which parts are finished."""

RETRIES = 5
"""How often a part is begun again after its worker or machine was lost."""
PATIENCE = 30.0
"""Seconds without news after which the cluster is asked whether any machine is left."""
STORE_BYTES = 100 << 20
"""Ray's shared memory on a machine that we start ourselves; nothing of ours goes through it."""


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Which cluster, and what one worker takes of it."""

    address: str
    """`local` starts Ray here for the run; `auto`, `HOST:PORT` or `ray://HOST:PORT` is one that runs already."""
    workers: int | None = None
    """Most workers at a time; as many as fit by default."""
    cpus: float = 1
    """Processors of one worker, and threads of its libraries."""
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers must be 1 or more, got {self.workers}")
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise InputError(f"a worker needs processors or GPUs, got cpus={self.cpus} and gpus={self.gpus}")


@contextmanager
def joined(where: Ray) -> Iterator[Start]:
    """A connection to the cluster, and how to encode parts by it; one that we made is closed at the end.

    Raises:
        MissingExtraError: no ray here. UnavailableError: no cluster at the address, or no machine of it has what a
            worker takes. RemoteError, from the iterator: a part lost its worker more often than it is begun again.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "encoding on a cluster") from error
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, where.address)
    try:
        _insist_on_room(ray, where)
        yield partial(_run, ray, where)
    finally:
        if ours:
            ray.shutdown()  # which also ends what is still running


def _run(
    ray: Any, where: Ray, name: str, identity: dict[str, str], parts: Sequence[Part], bulk: Bulk, out: Path
) -> Iterator[Record]:
    """The records as parts are finished, so many in flight as workers are wanted, or all."""
    # Without max_calls=0 Ray would start a worker, and load its model, anew for every task that has a GPU.
    work = ray.remote(num_cpus=where.cpus, num_gpus=where.gpus, max_retries=RETRIES, max_calls=0)(_work)
    waiting = list(reversed(parts))
    running: dict[Any, Part] = {}
    while waiting or running:
        while waiting and len(running) < (where.workers or len(parts)):
            part = waiting.pop()
            running[work.remote(name, identity, part, bulk, str(out), max(1, int(where.cpus)))] = part
        done, _ = ray.wait(list(running), timeout=PATIENCE)
        if not done:
            _insist_on_room(ray, where)
        for reference in done:
            yield _answer(ray, reference, running.pop(reference))


def _answer(ray: Any, reference: Any, part: Part) -> Record:
    try:
        answer: Record = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        what = f"{part.path} row groups {part.groups[0]} to {part.groups[1] - 1}"
        reason = str(error).strip().splitlines()[0]
        raise RemoteError(
            f"{what}: its worker was lost {RETRIES + 1} times ({type(error).__name__}: {reason}); if it needs more "
            "memory, give smaller batches or fewer workers a machine, then the same command again"
        ) from error
    if "error" in answer:
        raise getattr(errors, answer["error"])(*answer["said"])
    return answer


def _work(name: str, identity: dict[str, str], part: Part, bulk: Bulk, out: str, threads: int) -> dict[str, Any]:
    """One part, in a worker. The user's mistakes come back as data: they are not to be tried again."""
    # The tokenisers' pool would take every processor of the machine, whatever the worker was given.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    try:
        return encode_part(_model(name, bulk, tuple(identity.items())), identity, part, bulk, Path(out))
    except MissingExtraError as error:
        return {
            "error": "MissingExtraError",
            "said": (error.package, error.extra, f"on {socket.gethostname()}, {name}"),
        }
    except MatryoError as error:
        return {"error": type(error).__name__, "said": (str(error),)}


@lru_cache(maxsize=1)
def _model(name: str, bulk: Bulk, identity: tuple[tuple[str, str], ...]) -> "Model":
    """The worker's model, loaded once, if it is the one that the run was begun with."""
    from matryo.encoders import load

    model = load(name, bulk.device)
    if identity_of(model, name, bulk) != dict(identity):
        raise InputError(f"{name} on {socket.gethostname()} is another model than where the run was begun")
    return model


def _connect(ray: Any, address: str) -> None:
    """Join the cluster, or start one here, without its dashboard, its chatter and its reports home."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    elif address != "auto":
        _insist_on_listener(address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnavailableError(
            f"cannot join a Ray cluster at {address!r}: {reason}; start one with 'ray start --head' and give its "
            "address, or 'local' for this machine alone"
        ) from error


def _insist_on_listener(address: str) -> None:
    """Ray waits for minutes where nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"a Ray address is local, auto, HOST:PORT or ray://HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UnavailableError(
            f"nobody listens at the Ray address {address} ({error}); start a cluster with 'ray start --head', or give "
            "'local' for this machine alone"
        ) from error


def _insist_on_room(ray: Any, where: Ray) -> None:
    """Raise unless a living machine has what one worker takes; Ray itself would wait for one for ever."""
    living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(one.get("CPU", 0) >= where.cpus and one.get("GPU", 0) >= where.gpus for one in living):
        raise UnavailableError(
            f"none of the {len(living)} machines in the Ray cluster has the {where.cpus:g} CPU and {where.gpus:g} GPU "
            "that one worker takes; finished parts are kept: start such a machine or ask for less, and run it again"
        )
