"""Compaction beside readers, through kills, and from one store to the other."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from index_contract import names, rows

from matryo.core.errors import InputError
from matryo.index import Index
from matryo.index import writer as module
from matryo.index.vectors import STORES

PLAN = "32:binary keep 60 > 64:int8 keep 40 > 64:float32"
WHERE = {"even": True}

READER = """
import sys
import numpy as np
from matryo.index import Index

folder, queries = sys.argv[1], np.load(sys.argv[2])
with Index.open(folder, read_only=True) as index:
    calls = [
        lambda: index.search(queries, k=5),
        lambda: index.search(queries, k=5, plan="64:float32"),
        lambda: index.search(queries, k=5, where={"even": True}),
        lambda: len(index),
    ]
    truth = [call() for call in calls]
    print("ready", flush=True)
    rounds, generations = 0, set()
    while not (rounds > 3 and __import__("os").path.exists(sys.argv[3])):
        for call, expected in zip(calls, truth):
            assert call() == expected
        if rounds % 5 == 0:
            report = index.check()
            assert report.ok, report.problems
        generations.add(index.stats()["generation"])
        with Index.open(folder, read_only=True) as fresh:
            assert fresh.search(queries, k=5) == truth[0]
        rounds += 1
print(rounds, len(generations))
"""


def make(folder: Path, store: str = "float16") -> None:
    with Index.create(folder, width=64, plan=PLAN, store=store) as index:
        index.upsert(names(600), rows(600), [f"t{i}" for i in range(600)], [{"even": i % 2 == 0} for i in range(600)])
        index.delete(names(600)[::3])


@pytest.mark.parametrize("store", list(STORES))
def test_nobody_reading_sees_an_error_or_another_answer(tmp_path, store):
    """A thread of the compacting process and a second process search all the while, over 30 generations."""
    make(tmp_path / "i", store)
    queries = rows(3, seed=4)
    np.save(tmp_path / "queries.npy", queries)
    stop = tmp_path / "stop"
    other = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", READER, str(tmp_path / "i"), str(tmp_path / "queries.npy"), str(stop)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "ready\n"
        wrong: list[str] = []
        looked = [0]
        done = threading.Event()
        with Index.open(tmp_path / "i") as index:
            truth = [index.search(queries, k=5, where=where) for where in (None, WHERE)]

            def look() -> None:
                try:
                    while not done.is_set():
                        if [index.search(queries, k=5, where=where) for where in (None, WHERE)] != truth:
                            wrong.append("another answer")
                        looked[0] += 1
                except Exception as error:
                    wrong.append(repr(error))

            thread = threading.Thread(target=look)
            thread.start()
            for _ in range(30):
                index.compact()
            done.set()
            thread.join()
            assert index.stats()["generation"] == 31
        stop.touch()
        out, err = other.communicate(timeout=60)
        assert other.returncode == 0, err[-2000:]
        assert (wrong, looked[0] > 0) == ([], True)
        assert int(out.split()[1]) > 1, "the second process saw no change of generation"
    finally:
        other.kill()
        other.wait()


def test_searches_do_not_wait_for_a_compaction(tmp_path, monkeypatch):
    """The compaction stands still at its last step before the commit until a search has come back."""
    make(tmp_path / "i")
    with Index.open(tmp_path / "i") as index:
        searched, standing = threading.Event(), threading.Event()
        real = module._renumber

        def stand(*arguments):
            standing.set()
            assert searched.wait(30), "a search waited for the compaction"
            real(*arguments)

        monkeypatch.setattr(module, "_renumber", stand)
        thread = threading.Thread(target=index.compact)
        thread.start()
        assert standing.wait(30)
        before = index.search(rows(1), k=5)
        assert index.stats()["generation"] == 1
        searched.set()
        thread.join()
        assert index.stats()["generation"] == 2
        assert index.search(rows(1), k=5) == before


def test_the_codes_of_a_new_generation_are_there_when_it_begins(tmp_path, monkeypatch):
    make(tmp_path / "i")
    with Index.open(tmp_path / "i") as index:
        index.search(rows(1), plan="16:int8 keep 50 > 64:float32")
        index.compact()
        assert set(index.snapshot().codes.loaded()) == {(32, "binary"), (64, "int8"), (16, "int8")}
    with Index.open(tmp_path / "i", read_only=True) as index:
        monkeypatch.setattr("matryo.index.codes.Column.extend", lambda *_: None)  # only files may fill a column
        assert len(index.search(rows(1), k=5).ids[0]) == 5
        assert set(index.snapshot().codes.manifest) == {
            f"2-{name}.safetensors" for name in ("32-binary", "64-int8", "16-int8")
        }


@pytest.mark.parametrize("store", list(STORES))
def test_killed_at_each_system_call_of_a_compaction(tmp_path, store):
    script = Path(__file__).parent / "kill_compact.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tmp_path / "made"), store],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["wrong"] == []
    assert told["killed"] > 20
    assert told["old"] > 10
    assert told["new"] > 4


def test_from_one_store_to_the_other(tmp_path):
    make(tmp_path / "i", "float32")
    query = rows(3, seed=1)
    with Index.open(tmp_path / "i") as index:
        before = index.search(query, k=10)
        with pytest.raises(InputError, match="store must be 'float16' or 'float32', got 'int8'"):
            index.compact(store="int8")
        assert index.compact(store="float16") == 200
        assert (index.stats()["store"], index.stats()["vector_bytes"]) == ("float16", 400 * 64 * 2)
        halved = index.search(query, k=10)
        assert halved.ids == before.ids
        np.testing.assert_allclose(halved.scores, before.scores, atol=5e-4)
        index.upsert(["new"], rows(1, seed=9))
    assert [path.name for path in (tmp_path / "i").glob("vectors*")] == ["vectors-2.f16"]
    with Index.open(tmp_path / "i") as index:
        assert index.compact(store="float32") == 0
        assert index.check().ok
        assert index.search(rows(1, seed=9), k=1).ids == [["new"]]
        index.delete(["new"])
        np.testing.assert_allclose(index.search(query, k=10).scores, halved.scores, atol=1e-6)
