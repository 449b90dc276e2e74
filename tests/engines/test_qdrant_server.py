"""What a server of Qdrant can do to us: doors that are shut, keys, calls that fail for a moment, collections of others.

Over a real wire (`qdrant_wire`), with the engine of plain Python that the client brings behind it.
"""

import grpc
import numpy as np
import pytest
from index_contract import WIDTH, names, rows
from qdrant_client import models
from qdrant_wire import QdrantWire

from matryo import Index
from matryo.core.errors import AccessError, FormatError, InputError, NoIndexError, StorageError, UnavailableError
from matryo.engines import base, qdrant_server

pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact")


@pytest.fixture
def wire():
    made = QdrantWire()
    yield made
    made.stop()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(base, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(base, "LONGEST_WAIT", 0.01)


def test_two_writers_lose_and_double_nothing(wire):
    url = wire.url("docs")
    with Index.create(url, width=WIDTH) as one, Index.open(url) as two:
        one.upsert(names(30), rows(30))
        one.prepare("32:float32 keep 9 > 64:float32")
        two.upsert(names(60)[20:], rows(60)[20:])
        assert (len(one), len(two)) == (60, 60)
        assert one.check().ok, "the other one saw the new prefix"
        assert one.search(rows(60)[50:], k=1, plan="32:float32 keep 9 > 64:float32").ids == [
            [f"d{i}"] for i in range(50, 60)
        ]
        assert two.delete(["d1", "nobody"]) == 1
        assert len(one) == 59


def test_a_batch_goes_in_parts_and_the_source_follows_it(wire, monkeypatch):
    monkeypatch.setattr(qdrant_server, "SENT", 4 * WIDTH * 10)
    with Index.create(wire.url("docs"), width=WIDTH) as index:
        before = len(wire.guard.calls)
        index.extend([base.Batch(names(25), rows(25))], source="file")
        assert wire.guard.calls[before:].count("Upsert") == 4, "ten, ten, five, and the note"
        assert (len(index), index.read_from("file")) == (25, 25)


def test_a_call_that_fails_for_a_moment_is_made_again(wire, quick):
    with Index.create(wire.url("docs"), width=WIDTH) as index:
        for code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED"):
            wire.guard.failing += [(grpc.StatusCode[code], "wait")] * 2
            index.upsert(names(5), rows(5))
        assert len(index) == 5
        wire.guard.failing += [(grpc.StatusCode.UNAVAILABLE, "gone")] * base.ATTEMPTS
        with pytest.raises(UnavailableError, match=r"did not answer in 6 attempts \(gone\)"):
            index.search(rows(1))
        wire.guard.failing += [(grpc.StatusCode.INTERNAL, "No space left on device")]
        with pytest.raises(StorageError, match="No space left on device"):
            index.upsert(names(5), rows(5))


def test_an_answer_that_is_lost_costs_nothing(wire, quick):
    wire.guard.losing += ["Create", "Upsert"]
    with Index.create(wire.url("docs"), width=WIDTH) as index:
        wire.guard.losing += ["Upsert", "CreateVectorName", "UpdateVectors", "Delete"]
        index.upsert(names(9), rows(9))
        index.prepare("32:float32 keep 9 > 64:float32")
        index.delete(["d3"])
        assert not wire.guard.losing
        assert len(index) == 8
        assert index.check().ok


def test_a_server_that_is_not_there(quick):
    with pytest.raises(UnavailableError, match=r"qdrant://127\.0\.0\.1:1/docs\?timeout=1 did not answer in 6 attempts"):
        Index.open("qdrant://127.0.0.1:1/docs?timeout=1")


def test_a_key_is_used_and_never_shown(wire, quick, tmp_path, monkeypatch):
    wire.guard.key, url = "swordfish", wire.url("docs") + "?tls=no"
    with pytest.raises(AccessError, match="set QDRANT_API_KEY or QDRANT_API_KEY_FILE"):
        Index.create(url, width=8)
    monkeypatch.setenv("QDRANT_API_KEY", "wrong guess")
    with pytest.raises(AccessError, match=r"Invalid API key or JWT: \*\*\*") as refused:
        Index.create(url, width=8)
    assert "wrong guess" not in str(refused.value)
    monkeypatch.delenv("QDRANT_API_KEY")
    (tmp_path / "key").write_text("swordfish\n")
    monkeypatch.setenv("QDRANT_API_KEY_FILE", str(tmp_path / "key"))
    with Index.create(url, width=8) as index:
        assert len(index) == 0
        with Index.open(str(index.address)) as again:
            assert len(again) == 0
        assert "swordfish" not in f"{index!r} {index.address!r} {index.address}"
    # Without a word about TLS a key goes over it, which this server does not speak.
    with pytest.raises(UnavailableError) as refused:
        Index.open(wire.url("docs"))
    assert "swordfish" not in str(refused.value)


def test_what_is_not_ours_is_left_alone(wire):
    with pytest.raises(NoIndexError, match="holds no index"):
        Index.open(wire.url("docs"))
    wire.engine.create_collection("docs", models.VectorParams(size=4, distance="Cosine"))
    wire.engine.upsert("docs", [models.PointStruct(id=1, vector=[1, 0, 0, 0])])
    with pytest.raises(InputError, match="a collection of this name already"):
        Index.create(wire.url("docs"), width=8)
    with pytest.raises(FormatError, match="was not made by Matryo"):
        Index.open(wire.url("docs"))
    assert wire.engine.count("docs").count == 1


def test_a_making_that_fails_leaves_nothing(wire, monkeypatch):
    def refuse(self, note):
        raise OSError("no")

    monkeypatch.setattr(qdrant_server.QdrantServerIndex, "_write_note", refuse)
    with pytest.raises(OSError, match="no"):
        Index.create(wire.url("docs"), width=8)
    assert not wire.engine.collection_exists("docs")


def test_a_collection_of_another_width_is_refused(wire):
    with Index.create(wire.url("docs"), width=8) as index:
        note = index._note
    wire.engine.delete_collection("docs")
    wire.engine.create_collection("docs", {"full": models.VectorParams(size=4, distance="Dot")})
    with Index.create(wire.url("other"), width=8) as index:
        index.address = qdrant_server._address(wire.url("docs"))
        index._write_note(note)
    with pytest.raises(FormatError, match="noted to hold 8 dimensions as 'full', but holds 4 dimensions"):
        Index.open(wire.url("docs"))


def test_prepare_waits_until_the_server_is_done(wire, monkeypatch):
    with Index.create(wire.url("docs"), width=WIDTH) as index:
        index.upsert(names(5), rows(5))
        told, asked = wire.engine.get_collection("docs"), []

        def busy(name):
            asked.append(name)
            return told.model_copy(update={"status": "yellow" if len(asked) < 3 else "green"})

        monkeypatch.setattr(wire.engine, "get_collection", busy)
        index.prepare()
        assert len(asked) == 3
        monkeypatch.setattr(wire.engine, "get_collection", lambda _: told.model_copy(update={"status": "red"}))
        with pytest.raises(StorageError, match="optimisation failed"):
            index.prepare()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("qdrant://h:6334/docs?table=x", "unknown option 'table'; allowed: tls"),
        ("qdrant://h/docs?tls=maybe", "tls is yes or no, got 'maybe'"),
        ("qdrant://h/docs?timeout=soon", "timeout must be whole seconds, got 'soon'"),
        ("qdrant://h/a/b", "the path names the collection"),
        ("qdrant://h/", "the path names the collection"),
        ("qdrant://a,b/docs", "takes one host and no user"),
        ("qdrant://me@h/docs", "takes one host and no user"),
        ("qdrant:///docs", "takes one host and no user"),
        ("qdrant://me:hunter2@h/docs", "holds a password"),
        ("qdrant://h:99999/docs", "port '99999'"),
    ],
)
def test_a_wrong_url_is_refused(url, says):
    with pytest.raises(InputError, match=says) as refused:
        Index.open(url)
    assert "hunter2" not in str(refused.value)


def test_an_answer_comes_as_it_was_written(wire):
    fields = {"t": "ü", "n": 2**62 + 1, "x": 0.1, "yes": True, "none": None}
    with Index.create(wire.url("docs"), width=8) as index:
        index.upsert(["a"], np.eye(1, 8), ["text"], [fields])
        hits = index.search(np.eye(1, 8))
        assert (hits.ids, hits.scores, hits.documents, hits.metadata) == ([["a"]], [[1.0]], [["text"]], [[fields]])
