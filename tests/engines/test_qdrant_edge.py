"""What Qdrant embedded does beyond the contract: graphs and codes, locks, crashes, damage, wrong doors."""

import json
import shutil
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import qdrant_edge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_contract import WIDTH, names, rows, unit

from matryo import Index
from matryo.core.errors import DamagedError, FormatError, InputError, LockedError, NoIndexError
from matryo.engines import qdrant_edge as engine
from matryo.index import Batch

PLAN = "16:int8 hnsw(M=8,ef=100) keep 100 > 32:float32 keep 50 > 64:float32"


@pytest.fixture
def url(tmp_path):
    return f"qdrant+edge://{tmp_path}/docs"


def test_exact_plans_and_prefixes_equal_the_embedded_judge(url, tmp_path):
    queries, fields = rows(20, seed=1), [{"part": i % 3} for i in range(600)]
    with (
        Index.create(url, width=WIDTH, plan="32:float32 keep 60 > 64:float32") as index,
        Index.create(tmp_path / "judge", width=WIDTH, store="float32") as judge,
    ):
        for one in (index, judge):
            one.upsert(names(600), rows(600), metadata=fields)
            one.upsert(names(50), rows(50, seed=3), metadata=fields[:50])
        for asked in (
            {"plan": "64:float32"},
            {"plan": "32:float32 keep 60 > 64:float32"},
            {"plan": "64:float32", "where": {"part": {">": 0}}},
            {"width": 32},
        ):
            ours, theirs = index.search(queries, **asked), judge.search(queries, **asked)
            assert ours.ids == theirs.ids
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
        with pytest.raises(InputError, match=r"has no p16.*index.prepare\('16:float32'\)"):
            index.search(queries, width=16)


def test_a_plan_scans_the_graph_and_codes_that_prepare_built(url, monkeypatch):
    monkeypatch.setattr(engine, "FULL_SCAN", 1)
    with Index.create(url, width=WIDTH, plan=PLAN) as index:
        index.upsert(names(2000), rows(2000), metadata=[{"part": i % 10} for i in range(2000)])
        exact = index.search(rows(20, seed=1), plan="64:float32").ids
        assert index.stats()["indexed_vectors"] == 0
        assert index.search(rows(20, seed=1)).ids, "before the graph is there, rows are scanned"
        index.prepare()
        index.prepare()
        told = index.stats()
        assert told["indexed_vectors"] >= 2000
        assert told["vectors"] == ["full", "p16_int8_m8", "p32"]
        found = index.search(rows(20, seed=1)).ids
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.8
        filtered = index.search(rows(20, seed=1), where={"part": 3}, k=20)
        assert all(m["part"] == 3 for row in filtered.metadata for m in row)
        assert min(map(len, filtered.ids)) == 20


def test_a_plan_that_was_not_prepared_is_refused_until_it_is(url):
    plan = "16:binary keep 100 > 32:float16 keep 50 > 64:float32"
    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(700), rows(700))
        with pytest.raises(InputError, match="has no p16_binary and no p32_float16"):
            index.search(rows(1), plan=plan)
        index.prepare(plan)
        index.upsert(["late"], rows(1, seed=50))
        assert index.search(rows(1, seed=50), k=1, plan=plan).ids == [["late"]]
        assert index.check().ok
    with Index.open(url, read_only=True) as index:
        assert len(index.search(rows(3), k=40, plan=plan).ids[2]) == 40
        with pytest.raises(InputError, match="read_only"):
            index.prepare("8:float32 keep 9 > 64:float32")
        with pytest.raises(InputError, match="read_only"):
            index.delete(["d1"])


def test_a_calibrated_plan_is_kept_and_keeps_its_promise(url):
    plan = "32:int8 keep 100 > 64:float32"
    with Index.create(url, width=WIDTH, plan=plan) as index:
        index.upsert(names(1200), rows(1200))
        promise = index.calibrate(rows(200, seed=3), recall=0.9)
        assert promise.bound >= 0.9
        assert index.calibrate(recall=0.9).source == "items"
    with Index.open(url) as index:
        assert index.search(rows(2, seed=4), explain=True).promise.startswith("expected recall@10 >= 0.9")
        assert np.mean(index.recalls(rows(200, seed=4))(index.stats()["plan"])) > 0.85


def test_a_stream_that_was_cut_off_goes_on_where_it_was(url):
    def batches(start, stop):
        for n in range(start, stop, 50):
            yield Batch([f"d{i}" for i in range(n, n + 50)], rows(stop)[n : n + 50])

    def broken():
        yield from batches(0, 100)
        raise OSError("the file went away")

    with Index.create(url, width=WIDTH) as index:
        with pytest.raises(OSError, match="went away"):
            index.extend(broken(), source="file")
        assert (len(index), index.read_from("file")) == (100, 100)
        index.extend(batches(100, 200), source="file")
        assert (len(index), index.read_from("file")) == (200, 200)


def test_one_process_at_a_time_and_what_it_wrote_survives_its_death(url):
    Index.create(url, width=WIDTH).close()
    script = textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        from matryo import Index
        index = Index.open(sys.argv[1])
        index.upsert(["a", "b"], np.eye(2, 64), ["text", None])
        print("written", flush=True)
        sys.stdin.read()
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "written\n"
    for read_only in (False, True):
        with pytest.raises(LockedError, match="open elsewhere, and Qdrant Edge lets in one process at a time"):
            Index.open(url, read_only=read_only)
    child.kill()
    child.communicate()
    with Index.open(url) as index:
        assert index.search(np.eye(1, 64), k=1).documents == [["text"]]
        assert len(index) == 2
        with pytest.raises(LockedError):
            Index.open(url)
    with pytest.raises(InputError, match="this index is closed; open it again"):
        index.search(np.eye(1, 64))


def test_damage_is_said(url, tmp_path):
    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(300), rows(300))
    for spoil, error, says in (
        (lambda shard: (shard / "edge_config.json").write_text("{"), DamagedError, "cannot be opened"),
        (lambda shard: (shard / "edge_config.json").unlink(), FormatError, "not one of an index in Qdrant Edge"),
        (lambda shard: next(shard.glob("segments/*/segment.json")).write_text("{"), DamagedError, "build the index"),
        (lambda shard: shutil.rmtree(shard / "segments"), (FormatError, DamagedError), "docs"),
    ):
        copy = tmp_path / "copy" / "docs"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "docs", copy)
        spoil(copy / "shard")
        with pytest.raises(error, match=says):
            Index.open(f"qdrant+edge://{copy}")


def test_check_finds_what_was_changed_behind_its_back(url):
    with Index.create(url, width=WIDTH, plan="32:float32 keep 9 > 64:float32") as index:
        index.upsert(names(30), rows(30))
        assert index.check().ok
        point = qdrant_edge.Point("00000000-0000-0000-0000-000000000007", {"full": [0.5] * 64}, {"id": "stranger"})
        index._shard.update(qdrant_edge.UpdateOperation.upsert_points([point]))
        found = index.check().problems
        assert "its payload has another item's id ('stranger')" in found[0]
        assert "1 items lack one of full, p32" in found[1]
        index._shard.update(qdrant_edge.UpdateOperation.clear_payload([point.id]))
        with pytest.raises(FormatError, match="holds points that Matryo did not write"):
            index.search(np.ones(64), plan="64:float32")


def test_what_is_not_ours_is_left_alone(url, tmp_path):
    with pytest.raises(NoIndexError, match="holds no index"):
        Index.open(url)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "letter.txt").write_text("dear")
    with pytest.raises(FormatError, match="not one of an index in Qdrant Edge"):
        Index.open(url)
    with pytest.raises(InputError, match="not an empty folder"):
        Index.create(url, width=8)
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["letter.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]
    other = tmp_path / "other" / "shard"
    config = qdrant_edge.EdgeConfig(vectors={"full": qdrant_edge.EdgeVectorParams(8, qdrant_edge.Distance.Dot)})
    other.mkdir(parents=True)
    qdrant_edge.EdgeShard.create(str(other), config).close()
    with pytest.raises(FormatError, match="was not made by Matryo"):
        Index.open(f"qdrant+edge://{tmp_path}/other")


def test_a_note_of_another_format_or_width_is_refused(url):
    with Index.create(url, width=8) as index:
        with pytest.raises(InputError, match="holds an index already"):
            Index.create(url, width=8)
        text = json.loads(index._note.as_text())
        notes = [
            ({**text, "format": 9}, "of format 9"),
            ({**text, "width": 16}, "noted to hold 16 dimensions as 'full'"),
        ]
        index._write_note(index._note)
    for note, says in notes:
        shard = qdrant_edge.EdgeShard.load(url.removeprefix("qdrant+edge://") + "/shard")
        made = engine.words.note_point(json.dumps(note))
        shard.update(engine._upsert([made]))
        shard.close()
        with pytest.raises(FormatError, match=says):
            Index.open(url)


@pytest.mark.parametrize("wrong", ["qdrant+edge://docs", "qdrant+edge:///", "qdrant+edge:///a?table=b"])
def test_a_url_that_names_no_folder_is_refused(wrong):
    with pytest.raises(InputError, match="give the whole path of a folder"):
        Index.open(wrong)


def test_searches_go_on_while_others_write_and_prepare(url):
    plan = "16:binary keep 100 > 64:float32"
    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(200), rows(200))
        failures, done = [], threading.Event()

        def search():
            try:
                while not done.is_set():
                    assert index.search(rows(3), k=1).ids == [["d0"], ["d1"], ["d2"]]
            except Exception as error:
                failures.append(error)

        def write():
            try:
                for n in range(200, 300, 10):
                    index.upsert([f"d{i}" for i in range(n, n + 10)], rows(300)[n : n + 10])
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=search), threading.Thread(target=search), threading.Thread(target=write)]
        for thread in threads:
            thread.start()
        index.prepare(plan)
        threads[2].join()
        done.set()
        for thread in threads:
            thread.join()
        assert failures == []
        index.prepare(plan)
        assert len(index) == 300
        assert index.check().ok
        assert index.search(rows(300)[290:], k=1, plan=plan).ids == [[f"d{i}"] for i in range(290, 300)]


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [("qdrant_edge", "qdrant+edge:///a", "qdrant-edge"), ("qdrant_client", "qdrant://h/docs", "qdrant")],
)
def test_a_missing_package_names_its_extra(python, package, url, extra):
    code = f"import sys; sys.modules[{package!r}] = None; from matryo import Index; Index.open({url!r})"
    assert f"add it with: pip install 'matryo[{extra}]'" in python("-c", code).stderr


SCALARS = st.sampled_from([None, True, False, 0, 1, 2, -1, 1.0, 0.5, 2.5, "", "a", "1", "a b", "x.y"])
FIELDS = st.sampled_from(["a", "b", "c.d", "e f"])


def conditions():
    numbers = st.sampled_from([True, False, 0, 1, 2, 0.5, -1])
    leaf = st.one_of(
        SCALARS,
        st.dictionaries(st.sampled_from(["<", "<=", ">", ">="]), numbers, min_size=1, max_size=2),
        st.dictionaries(st.sampled_from(["=", "!="]), SCALARS, min_size=1, max_size=1),
        st.dictionaries(
            st.sampled_from(["in", "not_in"]),
            st.lists(SCALARS.filter(lambda value: value is not None), max_size=4),
            min_size=1,
            max_size=1,
        ),
    )
    flat = st.dictionaries(FIELDS, leaf, min_size=1, max_size=2)
    return st.recursive(
        flat,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"or": parts}),
            st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"and": parts}),
            inner.map(lambda part: {"not": part}),
        ),
        max_leaves=4,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same 120 items with fields of every kind, in both engines."""
    draw, place = np.random.default_rng(0), tmp_path_factory.mktemp("both")
    values = [None, True, False, 0, 1, 2, -1, 1.0, 0.5, 2.5, "", "a", "1", "a b", "x.y"]
    fields = [
        {name: values[draw.integers(len(values))] for name in ("a", "b", "c.d", "e f") if draw.random() < 0.7}
        for _ in range(120)
    ]
    fields = [one if draw.random() < 0.9 else None for one in fields]
    with (
        Index.create(f"qdrant+edge://{place}/docs", width=8) as index,
        Index.create(place / "judge", width=8) as judge,
    ):
        for one in (index, judge):
            # The first batch has one kind a field, so that each is indexed; what follows is mixed.
            one.upsert(["x", "y"], rows(2, width=8), metadata=[{"a": 1, "b": "a", "c.d": True, "e f": 0.5}] * 2)
            one.upsert(names(120), rows(120, width=8), metadata=fields)
        yield index, judge


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=conditions())
def test_every_filter_keeps_what_the_judge_keeps(both, where):
    index, judge = both
    query = np.ones(8)
    ours, theirs = (one.search(query, k=200, where=where) for one in (index, judge))
    assert set(ours.ids[0]) == set(theirs.ids[0])
    assert dict(zip(ours.ids[0], ours.metadata[0], strict=True)) == dict(
        zip(theirs.ids[0], theirs.metadata[0], strict=True)
    )


def test_unit_rows_are_kept_to_the_last_digit(url):
    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(20), rows(20))
        ids, kept = index._sample(20, 0)
        assert sorted(ids) == sorted(names(20))
        np.testing.assert_allclose(kept, unit(rows(20))[[int(key[1:]) for key in ids]], atol=1e-7)
