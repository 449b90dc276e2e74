"""Each write, fsync and rename fails once; the disk is full at every step. Old state or new, never a mix."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from index_contract import names, rows

from matryo.core.errors import StorageError
from matryo.index import Index
from matryo.index import catalogue as cat

PLAN = "32:binary keep 60 > 64:int8 keep 40 > 64:float32"
CALLS = ("pwrite", "fsync", "replace", "ftruncate", "open", "rename", "close", "unlink")


def dump(index: Index) -> dict:
    hits = index.search(np.ones(64, np.float32), k=10_000, plan="64:float32")
    assert len(index) == len(hits.ids[0])
    return dict(zip(hits.ids[0], zip(hits.scores[0], hits.documents[0], strict=True), strict=True))


def make(folder: Path) -> dict:
    with Index.create(folder, width=64, plan=PLAN) as index:
        index.upsert(names(60), rows(60), [f"t{i}" for i in range(60)])
        index.delete(names(10))
        return dump(index)


def operations():
    return {
        "upsert": lambda index: index.upsert(["d20", "n1", "n2"], rows(3, seed=5), ["a", "b", "c"]),
        "delete": lambda index: index.delete(["d30", "d31"]),
        "compact": lambda index: index.compact(),
    }


class FailOnce:
    """The n-th call of a function of os fails; the file system is otherwise as it is."""

    def __init__(self, monkeypatch, name: str, n: int, code: int) -> None:
        self.calls, real = 0, getattr(os, name)

        def failing(*args, **kwargs):
            self.calls += 1
            if self.calls == n:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", ["upsert", "delete", "compact"])
def test_each_system_call_failing_once(tmp_path, call, what):
    before = make(tmp_path / "made")
    shutil.copytree(tmp_path / "made", tmp_path / "good")
    with Index.open(tmp_path / "good") as index:
        operations()[what](index)
        after = dump(index)
    for n in range(1, 12):
        folder = tmp_path / f"i{n}"
        shutil.copytree(tmp_path / "made", folder)
        failed, reassured = False, True
        with Index.open(folder) as index:
            with pytest.MonkeyPatch.context() as patch:
                fault = FailOnce(patch, call, n, errno.ENOSPC if n % 2 else errno.EIO)
                try:
                    operations()[what](index)
                except StorageError as error:
                    failed = True
                    reassured = "lost" in str(error) or "still there" in str(error)
            assert reassured
            state = dump(index)
            assert state == (before if failed else after) or (failed and state == after)
            # The index goes on, and the same call now goes through.
            operations()[what](index)
            assert dump(index) == after
            assert index.check().ok
        with Index.open(folder) as index:
            assert dump(index) == after
            assert index.check().ok
        if fault.calls < n:
            break


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR])
@pytest.mark.parametrize("what", ["upsert", "delete", "compact"])
def test_the_catalogue_refusing_at_its_last_step(tmp_path, monkeypatch, what, code):
    before = make(tmp_path / "i")

    def refuse(*_):
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = code
        raise error

    with Index.open(tmp_path / "i") as index:
        with monkeypatch.context() as patch:
            patch.setattr(cat, "write_state", refuse)
            with pytest.raises(StorageError, match="still there"):
                operations()[what](index)
        assert dump(index) == before
        assert sorted(p.name for p in (tmp_path / "i").glob("vectors*")) == ["vectors-1.f16"]
        assert (tmp_path / "i" / "vectors-1.f16").stat().st_size == 60 * 64 * 2
        operations()[what](index)
        assert index.check().ok


def test_an_error_after_the_commit_went_through_keeps_the_batch(tmp_path, monkeypatch):
    make(tmp_path / "i")
    with Index.open(tmp_path / "i") as index:
        catalogue = index._catalogue
        real = catalogue.writing

        def late():
            class Late:
                def __enter__(self):
                    self.inner = real()
                    return self.inner.__enter__()

                def __exit__(self, *error):
                    self.inner.__exit__(*error)
                    raise OSError(errno.EIO, "after the commit")

            return Late()

        for what, check in (("upsert", lambda held: "n1" in held), ("compact", lambda held: "n1" in held)):
            with monkeypatch.context() as patch:
                patch.setattr(catalogue, "writing", late)
                with pytest.raises(StorageError):
                    operations()[what](index)
            assert check(dump(index))
            assert index.check().ok
        index.upsert(["n9"], rows(1))
        assert index.check().ok
    with Index.open(tmp_path / "i") as index:
        assert {"n1", "n9"} <= set(dump(index))
        assert index.check().ok


def test_codes_that_cannot_be_saved_cost_nothing_but_time(tmp_path, monkeypatch):
    index = Index.create(tmp_path / "i", width=64, plan=PLAN)
    index.upsert(names(50), rows(50))
    with monkeypatch.context() as patch:
        FailOnce(patch, "replace", 1, errno.ENOSPC)
        index.close()
    with Index.open(tmp_path / "i", read_only=True) as index:
        assert index.check().ok
        assert len(index.search(rows(1)).ids[0]) == 10


def test_a_disk_that_fills_up_inside_a_file_of_codes_is_a_storage_error(tmp_path, monkeypatch):
    """safetensors only makes the bytes and this package writes them, so that a refusal is always an OSError."""
    before = make(tmp_path / "i")

    def half(path, data):
        with path.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_files(*_):
        raise AssertionError("safetensors must not write files here: its disk errors are not OSErrors")

    monkeypatch.setattr("safetensors.numpy.save_file", no_files)
    with Index.open(tmp_path / "i") as index:
        with monkeypatch.context() as patch:
            patch.setattr("matryo.index.codes._write", half)
            with pytest.raises(StorageError, match=r"writing .*: No space left on device; nothing .* is lost"):
                index.compact()
        assert dump(index) == before
        left = sorted(path.name for path in (tmp_path / "i" / "codes").iterdir())
        assert left == ["1-32-binary.safetensors", "1-64-int8.safetensors"], "neither a torn file nor a temporary one"
        assert [path.name for path in (tmp_path / "i").glob("vectors*")] == ["vectors-1.f16"]
        assert index.compact() == 10
        assert index.check().ok
        assert dump(index) == before
    with Index.open(tmp_path / "i", read_only=True) as index:
        assert {f"codes/{name}" for name in os.listdir(tmp_path / "i" / "codes")} <= set(index.check().files)
        assert index.check().notes == ()


def test_making_an_index_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        FailOnce(patch, "rename", 1, errno.ENOSPC)
        with pytest.raises(StorageError):
            Index.create(tmp_path / "i", width=64)
    assert list(tmp_path.iterdir()) == []
    Index.create(tmp_path / "i", width=64).close()


FULL_DISK = """
import json, resource, signal, sys
import numpy as np
from matryo.core.errors import StorageError
from matryo.index import Index
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rng = np.random.default_rng(0)
told = []
index = Index.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for n in range(12):
    try:
        index.upsert([f"b{n}-{i}" for i in range(20)], rng.standard_normal((20, 64)), ["x" * 300] * 20)
        told.append(True)
    except StorageError:
        told.append(False)
    held = len(index)
    assert held == 50 + 20 * sum(told), (held, told)
    assert len(index.search(np.ones(64), k=1000, plan="64:float32").ids[0]) == held
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
index.upsert(["last"], rng.standard_normal((1, 64)))
index.close()
print(json.dumps(told))
"""


@pytest.mark.parametrize("limit", [16_000, 40_000, 64_000, 90_000, 150_000, 250_000])
def test_a_file_size_limit_refuses_whole_batches(tmp_path, limit):
    """No file may grow past the limit: our writes and SQLite's fail for real, wherever they happen to be."""
    make(tmp_path / "i")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path / "i"), str(limit)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert False in told
    with Index.open(tmp_path / "i") as index:
        assert index.check().ok
        assert set(dump(index)) == {
            *(f"d{i}" for i in range(10, 60)),
            *(f"b{n}-{i}" for n, ok in enumerate(told) if ok for i in range(20)),
            "last",
        }
