"""Kill a compacting process at each of its system calls in turn. Run by test_index_compact.py.

    python kill_compact.py FOLDER STORE

Before its n-th call of os.open, pwrite, fsync, replace or unlink, or of a step of the catalogue, the child kills itself
with SIGKILL; the parent opens what is left, compares it with what there was, and compacts it. Writes one line of JSON.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from matryo.index import Index
from matryo.index import catalogue as cat
from matryo.index import writer as module

STEPS = [(os, name) for name in ("open", "pwrite", "fsync", "replace", "unlink")] + [
    (cat, "write_state"),
    (cat, "write_head"),
    (cat.Catalogue, "tidy"),
    (module, "_renumber"),
    (module, "_write_codes"),
]


def held(index: Index) -> dict:
    hits = index.search(np.ones(64, np.float32), k=1000, plan="64:float32")
    return dict(zip(hits.ids[0], zip(hits.scores[0], hits.documents[0], strict=True), strict=True))


def die_at(number: int) -> None:
    calls = [0]

    def counting(real):
        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return counted

    for owner, name in STEPS:
        setattr(owner, name, counting(getattr(owner, name)))


def main() -> None:
    made, store = Path(sys.argv[1]), sys.argv[2]
    rng = np.random.default_rng(0)
    with Index.create(made, width=64, plan="32:binary keep 60 > 64:int8 keep 40 > 64:float32", store=store) as index:
        index.upsert([f"d{n}" for n in range(200)], rng.standard_normal((200, 64)), [f"t{n}" for n in range(200)])
        index.delete([f"d{n}" for n in range(0, 200, 3)])
        before = held(index)
    told: dict = {"killed": 0, "old": 0, "new": 0, "wrong": []}
    for number in range(1, 1000):
        folder = made.with_name("copy")
        shutil.copytree(made, folder)
        child = os.fork()
        if child == 0:
            try:
                index = Index.open(folder)
                die_at(number)
                index.compact()
                os._exit(0)
            finally:
                os._exit(9)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
            told["wrong"].append(f"step {number}: the child failed")
        for read_only in (True, False):
            with Index.open(folder, read_only=read_only) as index:
                if held(index) != before or not index.check().ok:
                    told["wrong"].append(f"step {number}: another index, read_only={read_only}")
                told["old" if index.stats()["dead_rows"] else "new"] += 1
                if not read_only:
                    files = sorted(path.name for path in folder.glob("vectors*"))
                    codes = {path.name[:2] for path in (folder / "codes").iterdir()}
                    if len(files) != 1 or len(codes) != 1:
                        told["wrong"].append(f"step {number}: left {files} {codes}")
                    index.compact()
                    if held(index) != before or not index.check().ok:
                        told["wrong"].append(f"step {number}: compacting it again went wrong")
        shutil.rmtree(folder)
        if not os.WIFSIGNALED(status):
            break
        told["killed"] += 1
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
