"""Three real servers as one index: what is refused, what a lost server costs, what a cut-off write leaves."""

import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import psycopg
import pytest
from index_contract import WIDTH, names, rows, unit

from matryo import Index
from matryo.core.errors import FormatError, InputError, NoIndexError, UnavailableError
from matryo.engines import base
from matryo.engines.postgres import PostgresIndex
from matryo.engines.postgres_shards import merged, shard_of
from matryo.index import Batch

COUNT = itertools.count()
GRAPH = "32:float16 hnsw(M=8,ef=80) keep 80 > 64:float32"


@pytest.fixture
def table():
    return f"p{next(COUNT)}"


@pytest.fixture
def url(three_postgres, table):
    return three_postgres.url(table)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(base, "FIRST_WAIT", 0.001)


def direct(server):
    return psycopg.connect(host=server.host, user="postgres", dbname="postgres", autocommit=True)


def tables(servers, table):
    """On which of the servers the table is."""
    found = []
    for server in servers:
        with direct(server) as connection:
            found.append(connection.execute("SELECT to_regclass(%s)", [table]).fetchone()[0] is not None)
    return found


def batches(start, stop, size=50):
    everything = rows(stop)
    for n in range(start, stop, size):
        yield Batch([f"d{i}" for i in range(n, n + size)], everything[n : n + size])


def test_the_shard_of_an_id_never_changes():
    assert [shard_of(key, 3) for key in ("d0", "d1", "d2", "Ω", "a" * 100)] == [0, 0, 0, 2, 2]
    counts = np.bincount([shard_of(key, 7) for key in names(70_000)])
    assert counts.min() > 9_500
    assert counts.max() < 10_500


def test_the_answers_are_the_k_best_by_score_then_id(url, three_postgres):
    few = np.random.default_rng(0).integers(-1, 2, (300, 8)).astype(np.float32)
    few[:, 0] = 1
    keys = [f"k{n}" for n in np.random.default_rng(1).permutation(300)]
    scores = unit(np.ones((1, 8)))[0] @ unit(few).T
    assert len(np.unique(scores.round(6))) < 40, "many are equal"
    with Index.create(url, width=8, store="float32") as index:
        index.upsert(keys, few)
        for k in (1, 7, 50, 400):
            for plan in ("8:float32", "4:float32 keep 300 > 8:float32"):
                hits = index.search(np.ones(8), k=k, plan=plan)
                told = dict(zip(hits.ids[0], hits.scores[0], strict=True))
                assert hits.ids[0] == sorted(told, key=lambda key: (-told[key], key))
                assert len(told) == min(k, 300)
                worst = min(told.values())
                left = [(s, key) for s, key in zip(scores, keys, strict=True) if key not in told]
                assert all(s < worst - 1e-6 or (abs(s - worst) < 1e-6 and key > hits.ids[0][-1]) for s, key in left)
    assert merged([], 3).ids == []


def test_an_item_lies_on_one_shard_and_is_replaced_there(url, three_postgres, table):
    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(60), rows(60))
        index.upsert(names(60)[::-1], rows(60, seed=1))
        assert len(index) == 60
        expected = np.bincount([shard_of(key, 3) for key in names(60)]).tolist()
        assert [one["items"] for one in index.stats()["shards"]] == expected
        assert index.check().ok
        at = shard_of("d7", 3)
        with direct(three_postgres[at]) as here, direct(three_postgres[at - 1]) as there:
            row = here.execute(f"DELETE FROM {table} WHERE id = 'd7' RETURNING id, vector::text").fetchone()
            there.execute(f"INSERT INTO {table} (id, vector) VALUES (%s, %s)", row)
        (problem,) = index.check().problems
        assert "holds 1 items that belong on other shards, such as 'd7'" in problem


def test_a_wrong_list_is_refused(url, three_postgres, table):
    a, b, c = (server.host.replace("/", "%2F") for server in three_postgres)

    def shards(*hosts, name=table):
        return f"postgresql+shards://postgres@{','.join(hosts)}/postgres?table={name}"

    with pytest.raises(NoIndexError, match="holds no index; make one"):
        Index.open(url)
    with Index.create(url, width=8) as index:
        assert str(index.address) == url
    for hosts, says in (
        ((a, b), "is one of 3 shards, but the URL names 2"),
        ((a, c, b), "is shard 3 of 3, but the URL names it as number 2; name the servers in the order"),
        ((a, b, b), "must name each server once"),
        ((), "must name each server once"),
    ):
        with pytest.raises(InputError, match=says):
            Index.open(shards(*hosts))
    with pytest.raises(InputError, match="is shard 2 of 3 of one index; open it whole"):
        Index.open(three_postgres[1].url(table))
    with pytest.raises(InputError, match="unknown option 'host'"):
        Index.open(f"{url}&host=/tmp")

    other = f"{table}b"
    Index.create(three_postgres[0].url(other), width=8).close()
    with pytest.raises(InputError, match="is an index of its own, no shard"):
        Index.open(shards(a, name=other))
    other = three_postgres.url(f"{table}c")
    Index.create(other, width=8).close()
    with direct(three_postgres[1]) as connection:
        connection.execute(f"DROP TABLE {table}c")
        connection.execute(f"DELETE FROM matryo_indexes WHERE name = '{table}c'")
    with pytest.raises(FormatError, match="holds no index, but other shards of"):
        Index.open(other)
    with direct(three_postgres[1]) as connection:  # as if restored from another index's backup
        noted = connection.execute("SELECT note FROM matryo_indexes WHERE name = %s", [table]).fetchone()[0]
        mine = noted.split('"index": "')[1][:32]
        changed = noted.replace(mine, "0" * 32)
        connection.execute("UPDATE matryo_indexes SET note = %s WHERE name = %s", [changed, table])
    with pytest.raises(InputError, match="is a shard of another index than"):
        Index.open(url)


def test_creating_leaves_all_or_nothing(url, three_postgres, table, quick, monkeypatch):
    with direct(three_postgres[2]) as connection:
        connection.execute(f"CREATE TABLE {table} (x int)")
    with pytest.raises(InputError, match="a table of this name already"):
        Index.create(url, width=8)
    assert tables(three_postgres, table) == [False, False, True]
    with direct(three_postgres[2]) as connection:
        connection.execute(f"DROP TABLE {table}")

    whole = PostgresIndex.make_in
    for lost in (0, 2):

        def cut(self, connection, lost=lost):
            whole(self, connection)
            if self.address.hosts[0][0] == three_postgres[2].host:  # the last one: now all are made, none is committed
                three_postgres[lost].crash()

        with monkeypatch.context() as patch:
            patch.setattr(PostgresIndex, "make_in", cut)
            with pytest.raises(UnavailableError, match=three_postgres[lost].host.replace("/", "%2F")):
                Index.create(url, width=8)
        three_postgres[lost].start()
        assert tables(three_postgres, table) == [False, False, False]
    with pytest.raises(NoIndexError):
        Index.open(url)
    with Index.create(url, width=8) as index:
        assert len(index) == 0


def test_a_commit_whose_answer_was_lost_is_made_anew(url, three_postgres, table, quick, monkeypatch):
    """A connection may break after the server committed and before it said so."""
    whole, tries = PostgresIndex.make_in, []

    def committed_unheard(self, connection):
        whole(self, connection)
        if self.address.hosts[0][0] == three_postgres[1].host and not tries:
            tries.append(1)
            connection.execute("COMMIT")
            connection.close()

    monkeypatch.setattr(PostgresIndex, "make_in", committed_unheard)
    with Index.create(url, width=8) as index:
        assert tries
        assert index.upsert(names(20), rows(20, width=8)) == 20


def test_a_search_names_the_shard_that_is_away_and_goes_on_when_it_is_back(url, three_postgres, quick):
    with Index.create(url, width=WIDTH, store="float32") as index:
        index.upsert(names(200), rows(200))
        expected = index.search(rows(3, seed=1))
        ended, failed = threading.Event(), []

        def ask():
            while not ended.is_set():
                try:
                    assert index.search(rows(3, seed=1)) == expected
                except UnavailableError as error:
                    failed.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        three_postgres[1].crash()
        try:
            with pytest.raises(UnavailableError, match=three_postgres[1].host.replace("/", "%2F")):
                index.search(rows(1))
            with pytest.raises(UnavailableError, match="did not answer in 6 attempts"):
                len(index)
            for call in (lambda: Index.open(url), index.stats, index.check, index.prepare, index.compact):
                with pytest.raises(UnavailableError, match="did not answer"):
                    call()
        finally:
            three_postgres[1].start()
        time.sleep(0.3)
        ended.set()
        for thread in threads:
            thread.join()
        assert failed
        assert all(three_postgres[1].host.replace("/", "%2F") in said for said in failed)
        assert index.search(rows(3, seed=1)) == expected


def test_a_shard_that_is_back_within_the_attempts_costs_nothing(url, three_postgres, monkeypatch):
    lost = []

    def wait(_):
        while lost:
            lost.pop().start()

    def lose(server):
        server.crash()
        lost.append(server)

    monkeypatch.setattr(base, "time", SimpleNamespace(sleep=wait))
    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(200), rows(200))
        lose(three_postgres[2])
        assert len(index.search(rows(1), k=200).ids[0]) == 200
        lose(three_postgres[0])
        assert index.upsert(names(220), rows(220)) == 220
        assert not lost
        assert len(index) == 220


def test_a_stream_cut_off_by_a_lost_shard_goes_on_where_it_was(url, three_postgres, quick):
    def broken():
        yield from batches(0, 150)
        three_postgres[1].crash()
        yield from batches(150, 300)

    with Index.create(url, width=WIDTH, store="float32") as index:
        with pytest.raises(UnavailableError, match=three_postgres[1].host.replace("/", "%2F")):
            index.extend(broken(), source="file")
        three_postgres[1].start()
        here = [shard_of(f"d{i}", 3) != 1 for i in range(150, 200)]
        assert len(index) == 150 + sum(here), "the batch is in where a server answered"
        assert index.read_from("file") == 150
    with Index.open(url) as index:
        assert index.read_from("file") == 150
        index.extend(batches(150, 300), source="file")
        assert (len(index), index.read_from("file")) == (300, 300)
        with pytest.raises(InputError, match="another source"):
            index.read_from("other")
        truth = np.argsort(-(unit(rows(5, seed=2)) @ unit(rows(300)).T), axis=1)[:, :10]
        assert index.search(rows(5, seed=2)).ids == [[f"d{i}" for i in row] for row in truth]


def test_a_stream_goes_on_after_its_very_first_batch_was_cut_off(url, three_postgres, quick):
    with Index.create(url, width=WIDTH) as index:

        def lost():
            three_postgres[0].crash()
            yield from batches(0, 50)

        with pytest.raises(UnavailableError):
            index.extend(lost(), source="file")
        three_postgres[0].start()
        assert 0 < len(index) < 50
        assert index.read_from("file") == 0
        with pytest.raises(InputError, match="another source"):
            index.read_from("other")
        index.extend(batches(0, 100), source="file")
        assert (len(index), index.read_from("file")) == (100, 100)


def test_a_deletion_cut_off_is_completed_by_repeating_it(url, three_postgres, quick):
    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(100), rows(100))
        three_postgres[2].crash()
        with pytest.raises(UnavailableError):
            index.delete(names(100))
        three_postgres[2].start()
        left = sum(shard_of(key, 3) == 2 for key in names(100))
        assert len(index) == left
        assert index.delete(names(100)) == left
        assert len(index) == 0


def test_graphs_are_built_on_every_shard_and_the_plan_is_one(url, three_postgres, table, monkeypatch):
    monkeypatch.setattr(base, "ITEMS_ASKED", 200)
    with Index.create(url, width=WIDTH, plan=GRAPH) as index:
        index.upsert(names(1200), rows(1200), metadata=[{"part": i % 10} for i in range(1200)])
        promise = index.calibrate(rows(150, seed=3), recall=0.9)
        assert promise.bound >= 0.9
        used = "SELECT count(*) FROM pg_stat_user_indexes WHERE relname = %s AND indexrelname LIKE %s AND idx_scan > 0"
        filtered = index.search(rows(20, seed=1), where={"part": 3}, k=20)
        assert all(m["part"] == 3 for row in filtered.metadata for m in row)
        assert min(map(len, filtered.ids)) == 20
        by_items = index.calibrate(recall=0.8, k=3, plan="32:binary keep 50 > 64:float32")
        assert by_items.source == "items"
        assert by_items.queries == 200
        assert index.compact() >= 0
    for server in three_postgres:
        with direct(server) as connection:
            assert connection.execute(used, [table, "%m8"]).fetchone()[0] == 1
    with Index.open(url, read_only=True) as index:
        assert index.stats()["plan"] == str(by_items.plan)
        hits = index.search(rows(200, seed=4), explain=True)
        assert hits.promise.startswith("expected recall@3 >= 0.8")
        assert np.mean(index.recalls(rows(200, seed=4), k=3)(str(by_items.plan))) > 0.75
        with pytest.raises(InputError, match="read_only"):
            index.delete(["d1"])
    with pytest.raises(InputError, match="is closed"):
        index.read_from("file")


def test_two_writers_lose_and_double_nothing(url, quick):
    Index.create(url, width=WIDTH).close()
    failures = []

    def write(seed):
        try:
            with Index.open(url) as index:
                for batch in batches(0, 400, 20):
                    index.upsert(batch.ids, batch.vectors)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with Index.open(url) as index:
        assert len(index) == 400
        assert index.check().ok
