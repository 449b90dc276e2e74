"""One writer, many readers, formats, models, folders, threads."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from index_contract import names, rows

import matryo as mt
from matryo.core.errors import DamagedError, FormatError, InputError, LockedError, StorageError
from matryo.index import Hits, Index
from matryo.index import catalogue as cat

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def folder(tmp_path):
    with Index.create(tmp_path / "i", width=64) as index:
        index.upsert(names(100), rows(100), [f"t{i}" for i in range(100)])
    return tmp_path / "i"


def test_the_front_door_leads_here():
    assert mt.Index is Index
    assert Hits([], [], [], []).explanation is None


def test_a_second_writer_is_told_at_once(folder):
    with Index.open(folder) as index:
        with pytest.raises(
            LockedError, match=r"open for writing elsewhere; close that one first, or .* read_only=True"
        ):
            Index.open(folder)
        code = f"from matryo.index import Index; Index.open({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert "LockedError" in done.stderr
        index.upsert(["more"], rows(1))
    Index.open(folder).close()


def test_a_refused_open_gives_the_lock_back(folder):
    for _ in range(2):
        with pytest.raises(InputError, match="another model"):
            Index.open(folder, model={"name": "x"})
    Index.open(folder).close()


def test_readers_see_each_commit_at_their_next_call(folder):
    with Index.open(folder) as writer, Index.open(folder, read_only=True) as reader:
        assert reader.search(rows(1, seed=9), k=1).ids != [["new"]]
        writer.upsert(["new"], rows(1, seed=9))
        assert reader.search(rows(1, seed=9), k=1).ids == [["new"]]
        writer.delete(["new"])
        assert reader.search(rows(1, seed=9), k=1).ids != [["new"]]
        before = reader.search(rows(3), k=5)
        assert writer.compact() == 1
        assert not (folder / "vectors-1.f16").exists()
        assert reader.search(rows(3), k=5) == before
        assert len(reader) == 100
        assert reader.check().ok


def test_a_reader_refuses_to_write(folder):
    with Index.open(folder, read_only=True) as reader:
        for call in (lambda: reader.upsert(["a"], rows(1)), lambda: reader.delete(["a"]), reader.compact):
            with pytest.raises(InputError, match="read_only"):
                call()


def test_a_closed_index_says_so(folder):
    index = Index.open(folder)
    index.close()
    index.close()
    for call in (
        lambda: index.search(rows(1)),
        lambda: index.delete(["a"]),
        index.stats,
        index.check,
        lambda: len(index),
    ):
        with pytest.raises(InputError, match="closed"):
            call()


def test_creating_over_anything_is_refused_and_loses_nothing(folder, tmp_path):
    with pytest.raises(InputError, match="already holds an index"):
        Index.create(folder, width=32)
    with Index.open(folder) as index:
        assert len(index) == 100
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        Index.create(other, width=32)
    assert (other / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    Index.create(tmp_path / "empty", width=32).close()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"width": 0}, "outside 1"),
        ({"width": True}, "integer"),
        ({"width": 64, "plan": "128:binary keep 5 > 128:float32"}, "64"),
        ({"width": 64, "plan": "32:binary hnsw(M=8,ef=9) keep 9 > 64:float32"}, "hnsw runs over"),
        ({"width": 64, "model": "toy"}, "must be a dict"),
        ({"width": 64, "store": "int8"}, "store must be 'float16' or 'float32', got 'int8'"),
        ({"width": 64, "model": {"x": object()}}, "must be JSON"),
    ],
)
def test_wrong_arguments_make_no_folder(tmp_path, arguments, says):
    with pytest.raises(InputError, match=says):
        Index.create(tmp_path / "i", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_opening_nothing(tmp_path):
    with pytest.raises(InputError, match="holds no index"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not an engine of this release"):
        Index.open("nosuch://localhost/x")


def test_another_model_is_refused(tmp_path):
    made = {"name": "toy", "digest": "ab12", "nesting": [16, 64]}
    Index.create(tmp_path / "i", width=64, model=made).close()
    for wanted in (made, {"digest": "ab12"}, None, {}):
        Index.open(tmp_path / "i", model=wanted).close()
    for wanted in ({"digest": "other"}, {**made, "nesting": [64]}, {"unknown": 1}):
        with pytest.raises(InputError, match=r"another model: its \w+ is .*, expected"):
            Index.open(tmp_path / "i", model=wanted)
    with Index.open(tmp_path / "i") as index:
        assert index.stats()["model"] == made


def test_another_format_version_names_both(folder):
    with sqlite3.connect(folder / cat.NAME) as connection:
        body, _ = cat.read_body(connection)
        fields = {**json.loads(body), "format": 9, "something": "new"}
        text = json.dumps(fields)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        connection.execute("UPDATE state SET body = ?, digest = ?", (text, digest))
    connection.close()
    for read_only in (True, False):
        with pytest.raises(FormatError, match="in format 9 and this release reads formats 1 and 2"):
            Index.open(folder, read_only=read_only)


@pytest.mark.parametrize(("number", "store"), [(1, "float32"), (2, "float16")])
def test_an_index_of_every_format_still_opens(tmp_path, number, store):
    shutil.copytree(GOLDEN / f"index-{number}", tmp_path / "i")
    expected = json.loads((GOLDEN / f"index-{number}.json").read_text())
    with Index.open(tmp_path / "i", model={"name": "golden"}) as index:
        assert index.check() == index.check()
        assert index.check().ok
        for search in expected["searches"]:
            hits = index.search(np.array(search["query"], np.float32), **search["arguments"])
            assert hits.ids == search["ids"]
            assert hits.documents == search["documents"]
            assert hits.metadata == search["metadata"]
            np.testing.assert_allclose(hits.scores, search["scores"], atol=1e-6)
        assert (index.stats()["format"], index.stats()["store"]) == (number, store)
        index.upsert(["new"], np.ones((1, 32)))
        assert (index.stats()["format"], index.stats()["store"]) == (2, store)
        index.compact()
        assert index.check().ok


def test_a_writer_cuts_off_what_a_killed_one_left(folder):
    path = folder / "vectors-1.f16"
    with path.open("ab") as stream:
        stream.write(b"\x7f" * 1000)
    (folder / "vectors-2.f16").write_bytes(b"half a compaction")
    (folder / "vectors-2.f16.tmp").write_bytes(b"x")
    (folder / "codes" / "7-64-binary.safetensors").write_bytes(b"x")
    with Index.open(folder, read_only=True) as reader:
        assert reader.check().ok
    with Index.open(folder) as index:
        assert path.stat().st_size == 100 * 64 * 2
        assert index.check().ok
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left == {"catalogue.sqlite", "head", "lock", "vectors-1.f16", "codes/1-64-binary.safetensors"}


def test_codes_are_read_back_and_grow(folder, monkeypatch):
    query = rows(2, seed=3)
    with Index.open(folder) as index:
        index.upsert([f"e{i}" for i in range(5)], rows(5, seed=6))  # under a tenth: the file stays as it was
    with Index.open(folder, read_only=True) as index:
        assert index.check().notes == ()
        hits = index.search(query, k=105, plan="64:binary keep 105 > 64:float32")
        assert hits == index.search(query, k=105, plan="64:float32")
        column = index._seen[1].codes.loaded()[64, "binary"]
        assert (column.rows, len(column.parts[0])) >= (105, 105)


def test_an_int8_scale_is_fitted_again_when_the_rows_double(tmp_path):
    with Index.create(tmp_path / "i", width=64, plan="64:int8 keep 20 > 64:float32") as index:
        index.upsert(names(10), np.eye(64)[:10] + 0.01)
        index.search(rows(1))
        index.upsert([f"e{i}" for i in range(30)], rows(30))
        index.search(rows(1))
        column = index._seen[1].codes.loaded()[64, "int8"]
        assert column.rows == column.fitted == 40


def test_searches_from_many_threads_while_writing(folder):
    truth = {key: row / np.linalg.norm(row) for key, row in zip(names(100), rows(100), strict=True)}
    extra = rows(200, seed=5)
    truth |= {f"e{i}": row / np.linalg.norm(row) for i, row in enumerate(extra)}
    stop = threading.Event()

    def look(index: Index, seed: int) -> int:
        query = rows(1, seed=seed)[0]
        done = 0
        while not stop.is_set() or done < 3:
            hits = index.search(query, k=8, where={"n": {">=": 0}} if done % 3 == 0 else None)
            for key, score in zip(hits.ids[0], hits.scores[0], strict=True):
                assert abs(truth[key] @ query / np.linalg.norm(query) - score) < 5e-4
            done += 1
            time.sleep(0.002)
        return done

    with Index.open(folder) as writer, Index.open(folder, read_only=True) as reader, ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(look, [writer, reader][n % 2], n) for n in range(3)]
        try:
            for i in range(0, 200, 20):
                writer.upsert([f"e{j}" for j in range(i, i + 20)], extra[i : i + 20], metadata=[{"n": i}] * 20)
                writer.delete([f"e{i}"])
                if i % 100 == 0:
                    writer.compact()
        finally:
            stop.set()
        assert all(job.result() >= 3 for job in jobs)
        assert len(reader) == len(writer) == 100 + 200 - 10


def test_files_and_connections_do_not_pile_up(folder):
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    with Index.open(folder) as index:
        index.search(rows(1))
        before = handles()
        for n in range(30):
            index.upsert([f"x{n}"], rows(1))
            index.search(rows(1))
            index.compact()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: index.search(rows(1)), range(100)))
        assert handles() <= before + 4 * 3
    for _ in range(20):
        Index.open(folder, read_only=True).close()
    assert handles() <= before


def test_a_folder_that_cannot_be_written_can_be_read(folder):
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as outside:
        os.chmod(outside, 0o755)
        copy = Path(outside) / "i"
        shutil.copytree(folder, copy)
        os.chmod(copy, 0o555)
        if root:
            os.seteuid(65534)
        try:
            with Index.open(copy, read_only=True) as index:
                assert len(index) == 100
                assert index.search(rows(1), k=1).ids == [["d0"]]
                assert index.check().ok
            if root:
                with pytest.raises(StorageError, match="read_only=True needs no lock"):
                    Index.open(copy)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(copy, 0o755)


def test_a_batch_larger_than_a_chunk_and_a_block_in_one_commit(tmp_path):
    base = rows(20_000, width=32)
    with Index.create(tmp_path / "i", width=32) as index:
        index.upsert(names(20_000), base)
        index.upsert(["d7", "z"], base[:2])
        assert index.check().ok
        assert index.stats()["commits"] == 2
        assert index.search(base[12345], k=1).ids == [["d12345"]]
        assert index.delete(names(20_000)) == 20_000
        assert index.compact() == 20_001
        assert index.search(base[:1]).ids == [["z"]]


def test_metadata_and_text_come_back_as_they_went_in(tmp_path):
    fields = {"é": "naïve 😀", "n": 2**62, "x": 0.1, "t": True, "none": None, "": None} | {"neg": -1.5e300}
    del fields[""]
    with Index.create(tmp_path / "i", width=32) as index:
        index.upsert(["kö 😀"], rows(1, width=32), ["tab\tnul\0end 😀"], [fields])
        hits = index.search(rows(1, width=32), where={"é": "naïve 😀", "n": 2**62, "t": True})
        assert (hits.ids, hits.documents, hits.metadata) == ([["kö 😀"]], [["tab\tnul\0end 😀"]], [[fields]])
        assert index.delete(["kö 😀"]) == 1


def test_stats_say_what_there_is(folder):
    with Index.open(folder) as index:
        index.search(rows(1))
        told = index.stats()
        assert (told["items"], told["dead_rows"], told["width"], told["format"]) == (100, 0, 64, 2)
        assert told["vector_bytes"] == told["files"]["vectors-1.f16"] == 100 * 64 * 2
        assert told["codes"] == {"64:binary": 800}
        assert "64:binary" in repr(index)


def test_a_catalogue_that_is_no_database_is_damage(folder):
    (folder / cat.NAME).write_bytes(b"not a database at all" * 1000)
    with pytest.raises(DamagedError):
        Index.open(folder)
