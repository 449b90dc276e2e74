"""What a real Milvus does: the contract, graphs that are built, plans that are calibrated, a server that goes away."""

import itertools
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from index_contract import WIDTH, names, rows, unit

from matryo import Index
from matryo.core.errors import AccessError, FormatError, InputError, NoIndexError, UnavailableError
from matryo.engines import base
from matryo.index import Batch

pytest.importorskip("pymilvus", reason="pip install 'matryo[milvus]'")
pytest.importorskip("milvus", reason="a real Milvus: pip install 'matryo[milvus-server]', or make test-milvus")
from pymilvus import DataType, MilvusClient
from test_milvus import MilvusContract, filters_agree

pytestmark = pytest.mark.slow
COUNT = itertools.count()
GRAPH = "32:float32 hnsw(M=8,ef=80) keep 80 > 64:float32"


class TestMilvusServer(MilvusContract):
    first_stages = ("32:float32", "32:binary", "64:binary")
    refused = (
        ("32:int8 keep 9 > 64:float32", "flat of Milvus runs over float32, binary"),
        ("32:float32 keep 9 > 64:binary", "score by float32"),
        ("32:binary keep 9 within 0.1 > 64:float32", "leave `within` out"),
        ("16:float32 keep 9 > 64:float32", "nothing prepared for 16:float32; call prepare"),
    )

    @pytest.fixture(autouse=True)
    def _server(self, milvus):
        self.server = milvus

    def url(self, where: Path) -> str:
        return self.server.url(f"t{next(COUNT)}")


@pytest.fixture
def url(milvus):
    return milvus.url(f"s{next(COUNT)}")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(base, "FIRST_WAIT", 0.001)


def direct(milvus):
    """A client of our own."""
    return MilvusClient(f"http://127.0.0.1:{milvus.port}", dedicated=True)


@pytest.mark.parametrize(
    "plan",
    [
        GRAPH,
        "32:float32 ivf(cells=8,probe=4) keep 200 > 64:float32",
        "32:int8 ivf(cells=8,probe=6) keep 200 > 64:float32",
        "64:binary ivf(cells=8,probe=6) keep 900 > 64:float32",
        "64:binary keep 900 > 64:float32",
    ],
)
def test_a_plan_scans_what_prepare_built(url, plan):
    with Index.create(url, width=WIDTH, plan=plan) as index:
        base_rows = rows(2000)
        index.upsert(names(2000), base_rows, metadata=[{"part": i % 10} for i in range(2000)])
        index.prepare()
        index.prepare()
        truth = np.argsort(-(unit(rows(20, seed=1)) @ unit(base_rows).T), axis=1)[:, :10]
        exact = index.search(rows(20, seed=1), plan="64:float32").ids
        assert exact == [[f"d{i}" for i in row] for row in truth], "exact beside a graph"
        found = index.search(rows(20, seed=1)).ids
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.8
        filtered = index.search(rows(20, seed=1), where={"part": 3}, k=20)
        assert all(m["part"] == 3 for row in filtered.metadata for m in row)
        assert min(map(len, filtered.ids)) == 20
        (home,) = index.stats()["columns"].values()
        told = index._ask("describe_index", home, index_name=home.split("__")[1])
        assert int(told["indexed_rows"]) == 2000


def test_a_calibrated_plan_is_kept_and_keeps_its_promise(url):
    with Index.create(url, width=WIDTH, plan=GRAPH) as index:
        index.upsert(names(1500), rows(1500))
        promise = index.calibrate(rows(200, seed=3), recall=0.9)
        assert promise.bound >= 0.9
    with Index.open(url) as index:
        hits = index.search(rows(100, seed=4), explain=True)
        assert hits.promise.startswith("expected recall@10 >= 0.9")
        assert np.mean(index.recalls(rows(100, seed=4))(str(promise.plan))) > 0.85


def test_a_column_prepared_later_holds_what_was_written_before_and_after(url):
    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(300), rows(300))
        with pytest.raises(InputError, match="nothing prepared for 16:float32"):
            index.search(rows(1), width=16)
        with Index.open(url) as other:
            index.prepare("16:float32")
            other.upsert(["x"], rows(1, seed=8))
            other.delete(["d3"])
        hits = index.search(rows(3, seed=5), k=5, width=16)
        held = np.concatenate([rows(300), rows(1, seed=8)])
        truth = unit(rows(3, seed=5)[:, :16]) @ unit(held[:, :16]).T
        truth[:, 3] = -1
        for q in range(3):
            order = np.argsort(-truth[q])[:5]
            assert hits.ids[q] == [f"d{i}" if i < 300 else "x" for i in order]
            np.testing.assert_allclose(hits.scores[q], truth[q][order], atol=1e-6)
        assert index.check() == index.check()
        assert index.check().notes == ()


def test_what_lies_beside_and_differs_is_found_and_mended(url, milvus):
    with Index.create(url, width=WIDTH, plan="32:float32 keep 50 > 64:float32") as index:
        index.upsert(names(30), rows(30))
        (home,) = index.stats()["columns"].values()
        client = direct(milvus)
        client.delete(home, ids=["d1", "d2"])
        client.upsert(home, [{"id": "ghost", "row": 1, "numbers": {}, "texts": {}, "p32_float32": rows(1)[0, :32]}])
        client.close()
        assert index.check().notes == (f"{home}: 1 rows of no item, 2 items not as they are; run compact",)
        assert "ghost" not in index.search(rows(1), k=40).ids[0], "items alone are answers"
        index.compact()
        assert index.check().notes == ()
        assert len(index.search(rows(1), k=40).ids[0]) == 30


def batches(start, stop, size=50):
    for n in range(start, stop, size):
        yield Batch([f"d{i}" for i in range(n, n + size)], rows(stop)[n : n + size])


def test_a_stream_that_was_cut_off_goes_on_where_it_was(url):
    def broken():
        yield from batches(0, 100)
        raise OSError("the file went away")

    with Index.create(url, width=WIDTH) as index:
        with pytest.raises(OSError, match="went away"):
            index.extend(broken(), source="file")
        assert (len(index), index.read_from("file")) == (100, 100)
        index.extend(batches(100, 200), source="file")
        assert (len(index), index.read_from("file")) == (200, 200)
        with pytest.raises(InputError, match="another source"):
            index.read_from("other")


def test_a_batch_cut_off_is_made_whole_by_writing_it_again(url, monkeypatch):
    with Index.create(url, width=WIDTH, plan="32:float32 keep 50 > 64:float32") as index:
        ask, seen = type(index)._ask, []

        def dies(self, verb, collection, *args, **given):
            if verb == "upsert":
                seen.append(collection)
                if len(seen) == 2:
                    raise KeyboardInterrupt
            return ask(self, verb, collection, *args, **given)

        with monkeypatch.context() as patch:
            patch.setattr(type(index), "_ask", dies)
            with pytest.raises(KeyboardInterrupt):
                index.extend(batches(0, 50), source="file")
        assert seen == [index.stats()["columns"]["32:float32"], index.address.name], "items come last"
        assert (len(index), index.read_from("file")) == (0, 0)
        assert index.search(rows(1)).ids == [[]]
        index.extend(batches(0, 50), source="file")
        assert (len(index), index.read_from("file")) == (50, 50)
        assert len(index.search(rows(1), k=60).ids[0]) == 50


def test_two_writers_lose_and_double_nothing(url):
    Index.create(url, width=WIDTH, plan="32:float32 keep 50 > 64:float32").close()
    failures = []

    def write(seed):
        try:
            with Index.open(url) as index:
                for n in range(0, 200, 20):
                    index.upsert([f"d{i}" for i in range(n, n + 20)], rows(200, seed)[n : n + 20])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with Index.open(url, read_only=True) as index:
        assert len(index) == 200
        found = index.search(rows(1), k=300, plan="64:float32").ids[0]
        assert sorted(found) == sorted(names(200))
        with pytest.raises(InputError, match="read_only"):
            index.delete(["d1"])
    with Index.open(url) as index:
        index.compact()
        assert index.check().notes == ()


def test_wrong_doors_are_named(url, quick, milvus):
    with pytest.raises(NoIndexError, match="holds no index"):
        Index.open(url)
    with pytest.raises(UnavailableError, match="did not answer in 6 attempts"):
        Index.open("milvus://127.0.0.1:9/docs?timeout=0.2")
    with pytest.raises(InputError, match="unknown option 'table'; allowed: consistency"):
        Index.open("milvus://h/docs?table=x")
    with pytest.raises(InputError, match="the last part names the index"):
        Index.open("milvus://h:19530")
    with pytest.raises(InputError, match="timeout must be seconds above 0, got 'soon'"):
        Index.open("milvus://h/docs?timeout=soon")
    with pytest.raises(InputError, match="consistency must be one of strong"):
        Index.open("milvus://h/docs?consistency=weak")
    with pytest.raises(InputError, match="create the database, or name another"):
        Index.create(url.replace(f"{milvus.port}/", f"{milvus.port}/nowhere/"), width=8)
    with pytest.raises(InputError, match="holds a password") as refused:
        Index.open("milvus://me:hunter2@h/docs")
    assert "hunter2" not in str(refused.value)


def test_what_is_not_ours_is_left_alone(url, milvus):
    name, client = url.rsplit("/", 1)[1], direct(milvus)
    schema = MilvusClient.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("v", DataType.FLOAT_VECTOR, dim=8)
    client.create_collection(name, schema=schema)
    with pytest.raises(InputError, match="a collection of this name already"):
        Index.create(url, width=8)
    with pytest.raises(FormatError, match="that Matryo did not make"):
        Index.open(url)
    assert client.describe_collection(name)["fields"][1]["name"] == "v"
    client.drop_collection(name)
    Index.create(url, width=8).close()
    with pytest.raises(InputError, match="a collection of this name already"):
        Index.create(url, width=8)
    noted = client.describe_collection(name)["properties"]["matryo.note"]
    client.alter_collection_properties(name, {"matryo.note": noted.replace('"format": 1', '"format": 9')})
    with pytest.raises(FormatError, match="of format 9"):
        Index.open(url)
    client.alter_collection_properties(name, {"matryo.note": noted.replace('"width": 8', '"width": 16')})
    with Index.open(url) as index, pytest.raises(FormatError, match="was changed"):
        index.upsert(["a"], np.ones((1, 16)))
    client.close()


def test_texts_longer_than_a_field_are_refused_before_anything_is_sent(url):
    with Index.create(url, width=8) as index:
        with pytest.raises(InputError, match=r"documents\[1\] takes 70,000 bytes; Milvus holds 65,535"):
            index.upsert(["a", "b"], rows(2, width=8), ["short", "x" * 70_000])
        with pytest.raises(InputError, match=r"ids\[0\] takes"):
            index.upsert(["é" * 40_000], rows(1, width=8))
        assert len(index) == 0
        index.upsert(["é" * 30_000], rows(1, width=8), ["x" * 65_535], [{"a": "y" * 60_000}])
        assert index.search(rows(1, width=8)).metadata == [[{"a": "y" * 60_000}]]


def test_filters_mean_what_they_mean_in_a_folder(url, tmp_path):
    session = f"{url}?consistency=session"  # as quick as they come
    with Index.create(session, width=32) as index, Index.create(tmp_path / "f", width=32, store="float32") as folder:
        filters_agree(index, folder)


def test_closed_is_closed(url):
    index = Index.create(url, width=8)
    index.close()
    index.close()
    for call in (lambda: index.search(np.ones(8)), lambda: index.upsert(["a"], np.ones((1, 8))), lambda: len(index)):
        with pytest.raises(InputError, match="this index is closed"):
            call()


def test_a_server_that_goes_away_in_the_middle_costs_nothing_acknowledged(milvus_of, quick, tmp_path):
    server = milvus_of(tmp_path / "milvus")
    try:
        url = server.url("docs", "?timeout=1")
        index = Index.create(url, width=WIDTH, plan="32:float32 keep 50 > 64:float32")

        def stream():
            for n, batch in enumerate(batches(0, 300)):
                if n == 3:
                    server.stop()
                yield batch

        with pytest.raises(UnavailableError, match="did not answer in 6 attempts"):
            index.extend(stream(), source="file")
        with pytest.raises(UnavailableError, match="what was acknowledged is there"):
            index.search(rows(1))
        with pytest.raises(UnavailableError):
            Index.open(url)
        server.start()
        with Index.open(server.url("docs")) as again:
            start = again.read_from("file")
            assert (start, len(again)) == (150, 150)
            again.extend(batches(start, 300), source="file")
            assert len(again) == 300
            assert sorted(again.search(rows(1), k=400).ids[0]) == sorted(names(300))
        assert len(index.search(rows(1), k=400).ids[0]) == 300, "the old connection finds the server again"
        index.close()
    finally:
        server.stop()


def test_a_token_is_used_and_never_shown(milvus_of, quick, tmp_path, monkeypatch, caplog):
    server = milvus_of(tmp_path / "milvus", "common.security.authorizationEnabled=true")
    caplog.set_level(logging.DEBUG)
    try:
        url = server.url("docs", "?timeout=3")
        with pytest.raises(AccessError, match="set MILVUS_TOKEN"):
            Index.create(url, width=8)
        monkeypatch.setenv("MILVUS_TOKEN", "root:swordfish")
        with pytest.raises(AccessError) as refused:
            Index.create(url, width=8)
        assert "swordfish" not in str(refused.value)
        (tmp_path / "secret").write_text("Milvus\n")
        monkeypatch.delenv("MILVUS_TOKEN")
        monkeypatch.setenv("MILVUS_TOKEN_FILE", str(tmp_path / "secret"))
        with Index.create(url.replace("//", "//root@"), width=8) as index:
            index.upsert(["a"], np.ones((1, 8)))
            with Index.open(str(index.address)) as again:
                assert len(again) == 1
            shown = f"{index!r} {index.address!r} {index.address}"
        assert "Milvus'" not in shown.replace("MilvusIndex('", "").replace("MilvusAddress", "")
        assert "swordfish" not in caplog.text
    finally:
        server.stop()
