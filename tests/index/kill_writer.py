"""Kill a writing process again and again, and after each kill look at what is there. Run by test_index_crash.py.

    python kill_writer.py FOLDER ROUNDS SEED

One process imports everything once and forks a writer per round. The writer notes each operation in a journal before
it starts and after it returns; the parent kills it at a random moment, opens the index and compares it with a replay
of the journal. Writes one line of JSON to standard output.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from matryo.index import Index

WIDTH = 64
Model = dict[str, int]


def vector(key: str, number: int) -> np.ndarray:
    return np.random.default_rng([int(key[1:]), number]).standard_normal(WIDTH).astype(np.float32)


def plan_of(number: int, seed: int) -> tuple[str, list[str]]:
    """What operation `number` does: a pure function, so that a journal of numbers is enough."""
    rng = random.Random(seed * 1_000_003 + number)
    kind = rng.choices(["upsert", "delete", "compact"], [6, 2, 1])[0]
    return kind, [f"k{n}" for n in rng.sample(range(300), rng.randint(1, 60))]


def apply(model: Model, number: int, seed: int) -> Model:
    kind, keys = plan_of(number, seed)
    after = dict(model)
    for key in keys:
        if kind == "upsert":
            after[key] = number
        elif kind == "delete":
            after.pop(key, None)
    return after


def write(folder: Path, journal: int, first: int, seed: int) -> None:
    index = Index.open(folder)
    number = first
    while True:
        kind, keys = plan_of(number, seed)
        os.write(journal, f"begin {number}\n".encode())
        if kind == "upsert":
            texts = [f"{key} {number}" for key in keys]
            index.upsert(keys, np.stack([vector(key, number) for key in keys]), texts, [{"n": number}] * len(keys))
        elif kind == "delete":
            index.delete(keys)
        else:
            index.compact()
        os.write(journal, f"done {number}\n".encode())
        number += 1


def found(folder: Path, read_only: bool) -> tuple[Model, list[str]]:
    """What the index says it holds, and what is wrong with that."""
    wrong: list[str] = []
    with Index.open(folder, read_only=read_only) as index:
        report = index.check()
        wrong += report.problems
        query = np.ones(WIDTH, np.float32)
        hits = index.search(query, k=1000, plan=f"{WIDTH}:float32")
        funnel = index.search(query, k=1000, plan=f"32:binary keep 1000 > {WIDTH}:float32")
        if hits != funnel or len(index) != len(hits.ids[0]):
            wrong.append("the funnel and the exact scan disagree")
        model: Model = {}
        for key, score, text, fields in zip(
            hits.ids[0], hits.scores[0], hits.documents[0], hits.metadata[0], strict=True
        ):
            named, number = (text or "").split()
            model[key] = int(number)
            row = vector(key, int(number)).astype(np.float64)
            truth = row.sum() / np.linalg.norm(row) / np.sqrt(WIDTH)
            if named != key or fields != {"n": int(number)} or abs(truth - score) > 5e-4:
                wrong.append(f"{key} is mixed up")
    return model, wrong


def main() -> None:
    folder, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    Index.create(folder, width=WIDTH, plan="32:binary keep 50 > 64:float32").close()
    model: Model = {}
    number = 0
    told = {"rounds": 0, "acknowledged": 0, "cut": 0, "cut_but_there": 0, "wrong": []}
    for turn in range(rounds):
        path = folder.with_name("journal")
        path.unlink(missing_ok=True)
        journal = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        child = os.fork()
        if child == 0:
            try:
                write(folder, journal, number, seed)
            finally:
                os._exit(9)
        deadline = time.monotonic() + 10
        # Half of the kills may hit the opening, the other half come once writing has begun.
        while turn % 2 and not path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(journal)
        if not os.WIFSIGNALED(status):
            told["wrong"].append(f"round {turn}: the writer ended by itself")
        begun: int | None = None
        for line in path.read_text().splitlines():
            word, which = line.split()
            begun = int(which) if word == "begin" else None
            if word == "done":
                model = apply(model, int(which), seed)
                number = int(which) + 1
                told["acknowledged"] += 1
        there, wrong = found(folder, read_only=turn % 3 == 0)
        if begun is not None:
            told["cut"] += 1
            after = apply(model, begun, seed)
            told["cut_but_there"] += there == after != model
            number = begun + 1
            if there == after:
                model = after
        if there != model:
            wrong.append(f"holds {len(there)} items, expected {len(model)}")
        told["wrong"] += [f"round {turn}: {what}" for what in wrong]
        told["rounds"] += 1
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
