"""Flipped bits and cut files, in every file of an index: a typed error, or answers that are still the truth."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from index_contract import names, rows

from matryo.core.errors import DamagedError, MatryoError
from matryo.index import Index

PLAN = "32:binary keep 30 > 64:int8 keep 20 > 64:float32"
WHERE = {"shelf": {"<": 2}}


def make(folder: Path) -> None:
    with Index.create(folder, width=64, plan=PLAN, model={"name": "toy"}) as index:
        fields = [{"shelf": i % 4} for i in range(300)]
        index.upsert(names(300), rows(300), [f"text of {i}" for i in range(300)], fields)
        index.delete(names(40)[::2])
        index.upsert(["d1", "d3"], rows(2, seed=3), ["again", "again"], [{"shelf": 0}] * 2)


def answers(folder: Path) -> list:
    with Index.open(folder, read_only=True, model={"name": "toy"}) as index:
        query = rows(3, seed=8)
        return [
            index.search(query, k=5),
            index.search(query, k=400, plan="64:float32"),
            index.search(query, k=400, where=WHERE),
            len(index),
        ]


def writer_answers(folder: Path) -> list:
    """What is there after writing to it: the writer must not build on damage."""
    with Index.open(folder) as index:
        assert index.upsert(["d5", "new"], rows(2, seed=4)) == 2
        assert index.delete(["d7", "d0"]) == 1
        assert index.compact() >= 0
        hits = index.search(rows(1, seed=8), k=400, plan="64:float32")
        return [hits, len(index)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "made"
    make(folder)
    assert {p.name for p in folder.iterdir()} == {"catalogue.sqlite", "vectors-1.f16", "head", "lock", "codes"}
    for name in ("read", "written"):
        shutil.copytree(folder, folder.with_name(name))
    return folder, answers(folder.with_name("read")), writer_answers(folder.with_name("written"))


def damage(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "bit", "bit", "byte", "cut", "zeros", "longer"])
    place = rng.randrange(len(data))
    if kind == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[place] = rng.randrange(256)
    elif kind == "cut":
        del data[place:]
    elif kind == "zeros":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    else:
        data += bytes(rng.randrange(256) for _ in range(100))
    path.write_bytes(data)
    return f"{kind} at {place} of {path.name}"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "lock")


def batter(made, tmp_path: Path, times: int, seed: int) -> dict[str, list[int]]:
    folder, truth, written = made
    told: dict[str, list[int]] = {}
    for name in files(folder):
        rng = random.Random(f"{seed} {name}")
        refused = harmless = 0
        for turn in range(times):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            what = damage(copy / name, rng)
            try:
                if turn % 2:
                    assert answers(copy) == truth, f"{what}: searched and wrong"
                else:
                    assert writer_answers(copy) == written, f"{what}: written to and wrong"
                harmless += 1
            except DamagedError:
                refused += 1
            except MatryoError as error:
                pytest.fail(f"{what}: {error!r}")
            shutil.rmtree(copy)
        told[name] = [refused, harmless]
    return told


def test_damage_is_refused_or_harmless(made, tmp_path):
    told = batter(made, tmp_path, 80, seed=0)
    assert len(told) == 5
    # Vectors and head: every changed byte is caught; only bytes added past the committed end are not read.
    for name in ("vectors-1.f16", "head"):
        assert told[name][0] > 55
    # Codes are derived: damage there is never refused, because they are made again.
    assert all(refused == 0 for name, (refused, _) in told.items() if name.startswith("codes/"))


@pytest.mark.slow
def test_3000_damages_per_file_are_refused_or_harmless(made, tmp_path):
    batter(made, tmp_path, 3000, seed=1)


def test_check_finds_every_flipped_bit_that_matters(made, tmp_path):
    """A bit that check does not see must lie where SQLite keeps nothing."""
    folder, truth, _ = made
    rng = random.Random(5)
    for name in files(folder):
        for _ in range(25):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            data = bytearray((copy / name).read_bytes())
            place = rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
            (copy / name).write_bytes(data)
            try:
                with Index.open(copy, read_only=True) as index:
                    report = index.check()
                if name == "catalogue.sqlite":
                    assert not report.ok or answers(copy) == truth
                else:
                    assert not report.ok or (name.startswith("codes/") and len(report.notes) == 1)
            except DamagedError as error:
                if str(copy) not in str(error) or "restore the folder" not in str(error):
                    pytest.fail(f"says neither where nor what to do: {error}")
            shutil.rmtree(copy)


def test_a_large_file_is_verified_block_by_block_before_use(tmp_path, monkeypatch):
    from matryo.index import folder as module

    monkeypatch.setattr(module, "VERIFY_AT_OPEN", 0)
    with Index.create(tmp_path / "i", width=1024) as index:
        index.upsert(names(1000), rows(1000, width=1024), metadata=[{"n": i} for i in range(1000)])
    path = tmp_path / "i" / "vectors-1.f16"
    data = np.fromfile(path, np.float16)
    data[900 * 1024 + 5] += np.float16(1e-3)
    data.tofile(path)
    with Index.open(tmp_path / "i", read_only=True) as index:
        assert index.search(rows(1, width=1024), where={"n": {"<": 5}}).ids[0]
        with pytest.raises(DamagedError, match=r"rows 512\.\.999"):
            index.search(rows(1, width=1024), where={"n": 900})
        with pytest.raises(DamagedError):
            index.search(rows(1, width=1024), plan="1024:float32")
        assert not index.check().ok


def test_damaged_metadata_of_a_large_catalogue_is_found_before_it_is_filtered(tmp_path, monkeypatch):
    from matryo.index import folder as module

    monkeypatch.setattr(module, "VERIFY_AT_OPEN", 0)
    make(tmp_path / "i")
    path = tmp_path / "i" / "catalogue.sqlite"
    data = path.read_bytes()
    assert data.count(b'{"shelf": 1}') > 50
    path.write_bytes(data.replace(b'{"shelf": 1}', b'{"shelf": 3}', 1))
    with Index.open(tmp_path / "i", read_only=True) as index, pytest.raises(DamagedError, match="not what was written"):
        index.search(rows(1), where={"shelf": 3})


def test_a_damaged_log_that_loses_commits_is_noticed(tmp_path):
    """SQLite takes a broken log as the end of the log; the commits behind it had been acknowledged."""
    index = Index.create(tmp_path / "i", width=64)
    for n in range(5):
        index.upsert([f"a{n}"], rows(1, seed=n))
    shutil.copytree(tmp_path / "i", tmp_path / "killed")  # as a kill leaves it: the log is not folded in
    index.close()
    log = tmp_path / "killed" / "catalogue.sqlite-wal"
    assert log.stat().st_size > 0
    shutil.copytree(tmp_path / "killed", tmp_path / "sound")
    with Index.open(tmp_path / "sound") as index:
        assert len(index) == 5
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    for read_only in (True, False):
        with pytest.raises(DamagedError, match=r"commit 5 was acknowledged"):
            Index.open(tmp_path / "killed", read_only=read_only)


@pytest.mark.parametrize("name", ["vectors-1.f16", "head", "catalogue.sqlite"])
def test_a_missing_file_is_damage(made, tmp_path, name):
    shutil.copytree(made[0], tmp_path / "i")
    (tmp_path / "i" / name).unlink()
    for read_only in (True, False):
        with pytest.raises(DamagedError):
            Index.open(tmp_path / "i", read_only=read_only)


def test_codes_may_be_deleted(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "i")
    shutil.rmtree(tmp_path / "i" / "codes")
    assert answers(tmp_path / "i") == made[1]
    with Index.open(tmp_path / "i") as index:
        assert len(index.check().notes) == 2
        index.compact()
        assert index.check().notes == ()


CUT = """
import os, sys
import numpy as np
from matryo.core.errors import DamagedError
from matryo.index import Index

folder, plan, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
query = np.ones(64, np.float32)
with Index.open(folder, read_only=True) as index:
    index.search(query, k=5, plan=plan)
    os.truncate(os.path.join(folder, "vectors-1.f16"), left)
    for call in (lambda: index.search(query, k=5, plan=plan), lambda: index.search(query, where={"shelf": 0})):
        try:
            call()
        except DamagedError as error:
            assert f"{left} bytes, but " in str(error), error
        else:
            raise AssertionError("a file that was cut short was searched")
    assert any("were committed" in problem for problem in index.check().problems)
print("alive")
"""


@pytest.mark.parametrize("plan", [PLAN, "64:float32", "8:float32 keep 20 > 64:float16 keep 9 > 64:float32"])
@pytest.mark.parametrize("left", [0, 64 * 2 * 100])
def test_a_file_cut_short_while_it_is_mapped_is_refused_and_the_process_lives(tmp_path, python, plan, left):
    make(tmp_path / "i")
    ran = python("-W", "error", "-c", CUT, tmp_path / "i", plan, left)
    assert (ran.returncode, ran.stdout) == (0, "alive\n"), ran.stderr
