"""What a real server does: graphs that are used, plans that are calibrated, connections that break, wrong doors."""

import itertools
import threading
import time

import numpy as np
import psycopg
import pytest
from index_contract import WIDTH, names, rows, unit

from matryo import Index
from matryo.core.errors import AccessError, FormatError, InputError, UnavailableError
from matryo.engines import base
from matryo.index import Batch

COUNT = itertools.count()
GRAPH = "32:float16 hnsw(M=8,ef=80) keep 80 > 64:float32"
SCANS = {"hnsw": "hnsw(M=8,ef=100)", "ivf": "ivf(cells=8,probe=6)"}


@pytest.fixture
def url(postgres):
    return postgres.url(f"s{next(COUNT)}")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(base, "FIRST_WAIT", 0.001)


def direct(url):
    """A connection of our own to the server behind an index's URL."""
    return psycopg.connect(
        host=url.split("host=")[1].split("&")[0], user="postgres", dbname="postgres", autocommit=True
    )


@pytest.mark.parametrize(
    "plan",
    [
        GRAPH,
        "32:float32 hnsw(M=8,ef=40) keep 200 > 64:float32",
        "64:binary hnsw(M=8,ef=40) keep 900 > 64:float32",
        "32:float16 ivf(cells=8,probe=4) keep 200 > 64:float32",
    ],
)
def test_a_plan_scans_the_index_that_prepare_built(url, plan):
    with Index.create(url, width=WIDTH, plan=plan) as index:
        index.upsert(names(2000), rows(2000), metadata=[{"part": i % 10} for i in range(2000)])
        exact = index.search(rows(20, seed=1), plan="64:float32").ids
        assert index.search(rows(20, seed=1)).ids, "searches before the index is there are exact scans"
        index.prepare()
        index.prepare()
        (name,) = [n for n in index.stats()["index_bytes"] if n.endswith(("m8", "cells8"))]
        used = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = %s"
        found = index.search(rows(20, seed=1)).ids
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
        assert recall > 0.9
        filtered = index.search(rows(20, seed=1), where={"part": 3}, k=20)
        assert all(m["part"] == 3 for row in filtered.metadata for m in row)
        assert min(map(len, filtered.ids)) == 20, "the scan goes on until enough items match"
        index.close()
        with direct(url) as connection:
            connection.execute("SELECT pg_stat_force_next_flush()")
            assert connection.execute(used, [name]).fetchone()[0] > 0


@pytest.mark.parametrize("code", ["float16", "binary"])
def test_cells_and_a_graph_on_one_prefix_serve_their_own_plans(url, code):
    """The server's planner takes the cheaper of two indexes on one expression, which says nothing of their recall."""
    plans = {name: f"32:{code} {scan} keep 40 > 64:float32" for name, scan in SCANS.items()}

    def scans(connection) -> dict[str, int]:
        connection.execute("SELECT pg_stat_force_next_flush()")
        found = connection.execute(
            "SELECT indexrelname, idx_scan FROM pg_stat_user_indexes WHERE relname = %s", [url.split("table=")[1]]
        ).fetchall()
        return {
            plan: sum(n for name, n in found if name.endswith(tag)) for plan, tag in (("hnsw", "m8"), ("ivf", "cells8"))
        }

    with Index.create(url, width=WIDTH) as index:
        index.upsert(names(2000), rows(2000))
        for plan in plans.values():
            index.prepare(plan)
        index.compact()
        for name, plan in plans.items():
            with direct(url) as connection:
                before = scans(connection)
            with Index.open(url) as reader:  # its connection tells what it did when it ends
                reader.search(rows(5, seed=1), plan=plan)
            with direct(url) as connection:
                after = scans(connection)
            assert [each for each in after if after[each] > before[each]] == [name]


def test_an_exact_plan_is_exact_beside_a_graph(url):
    with Index.create(url, width=WIDTH, plan=GRAPH, store="float32") as index:
        base_rows = rows(1500)
        index.upsert(names(1500), base_rows)
        index.prepare()
        truth = np.argsort(-(unit(rows(5, seed=2)) @ unit(base_rows).T), axis=1)[:, :10]
        for plan in ("64:float32", "32:float16 keep 1500 > 64:float32"):
            assert index.search(rows(5, seed=2), plan=plan).ids == [[f"d{i}" for i in row] for row in truth]


def test_a_calibrated_plan_is_kept_and_keeps_its_promise(url):
    with Index.create(url, width=WIDTH, plan=GRAPH) as index:
        index.upsert(names(2000), rows(2000))
        promise = index.calibrate(rows(300, seed=3), recall=0.9)
        assert promise.bound >= 0.9
        by_items = index.calibrate(recall=0.9, plan="32:binary keep 50 > 64:float32")
        assert by_items.source == "items"
    with Index.open(url) as index:
        hits = index.search(rows(200, seed=4), explain=True)
        assert hits.promise.startswith("expected recall@10 >= 0.9")
        assert np.mean(index.recalls(rows(200, seed=4))(str(by_items.plan))) > 0.85
        with pytest.raises(InputError, match="queries cannot show"):
            index.calibrate(rows(3), recall=0.99)


def test_a_prefix_answers_as_an_index_of_that_width_would(url):
    with Index.create(url, width=WIDTH, store="float32") as index:
        index.upsert(names(300), rows(300))
        hits = index.search(rows(3, seed=5), k=5, width=16)
        truth = unit(rows(3, seed=5)[:, :16]) @ unit(rows(300)[:, :16]).T
        for q in range(3):
            order = np.argsort(-truth[q])[:5]
            assert hits.ids[q] == [f"d{i}" for i in order]
            np.testing.assert_allclose(hits.scores[q], truth[q][order], atol=1e-6)


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
        with pytest.raises(InputError, match="another source"):
            index.read_from("other")


def test_a_connection_that_breaks_costs_nothing(url, quick):
    with Index.create(url, width=WIDTH) as index, direct(url) as connection:
        index.upsert(names(10), rows(10))
        for call in (
            lambda: index.upsert(names(20), rows(20)),
            lambda: index.search(rows(1)),
            lambda: index.delete(["d3"]),
        ):
            ended = connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'matryo'"
            )
            assert ended.fetchone()[0] >= 1
            call()
        assert len(index) == 19


def test_a_batch_cut_off_in_its_transaction_is_not_there(url, quick, monkeypatch):
    from matryo.engines import postgres_sql

    with Index.create(url, width=WIDTH) as index, direct(url) as connection:
        index.upsert(names(10), rows(10))
        whole = postgres_sql.copy_rows
        broken = []

        def cut(*args):
            blocks = list(whole(*args))
            if not broken:
                broken.append(True)
                yield blocks[0][:-400]
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'matryo'"
                )
                with Index.open(url) as other:
                    assert len(other) == 10
                yield blocks[0][-400:]
            else:
                yield from blocks

        monkeypatch.setattr(postgres_sql, "copy_rows", cut)
        index.upsert([f"x{i}" for i in range(30)], rows(30))
        assert broken
        assert len(index) == 40


def test_two_writers_lose_and_double_nothing(url, quick):
    Index.create(url, width=WIDTH).close()
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
        with pytest.raises(InputError, match="read_only"):
            index.delete(["d1"])


def test_wrong_doors_are_named(url, quick, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no index"):
        Index.open(url)
    with pytest.raises(UnavailableError, match="did not answer in 6 attempts"):
        Index.open(f"postgresql:///postgres?host={tmp_path}&table=x")
    with pytest.raises(AccessError, match="name the user in the URL"):
        Index.open(url.replace("postgres@", "nobody@"))
    with pytest.raises(InputError, match="does not exist; create it"):
        Index.open(url.replace("/postgres?", "/nowhere?"))
    with pytest.raises(InputError, match="unknown option 'tabel'; allowed: table"):
        Index.open("postgresql://h/db?tabel=x")
    with pytest.raises(InputError, match="names the index and must be letters"):
        Index.open("postgresql://h/db?table=a-b;drop")
    with pytest.raises(InputError, match="port '99999'"):
        Index.open("postgresql://h:99999/db")
    with pytest.raises(InputError, match="holds no URL"):
        Index.open("env:MATRYO_NO_SUCH")
    with pytest.raises(InputError, match="holds a password") as refused:
        Index.open("postgresql://me:hunter2@h/db")
    assert "hunter2" not in str(refused.value)


def test_a_password_is_used_and_never_shown(url, quick, monkeypatch, tmp_path):
    (tmp_path / "secret").write_text("hunter2\n")
    monkeypatch.setenv("MATRYO_POSTGRES_PASSWORD_FILE", str(tmp_path / "secret"))
    seen = []
    connect = psycopg.connect

    def spy(**given):
        seen.append(given.get("password"))
        return connect(**given)

    monkeypatch.setattr(psycopg, "connect", spy)
    with Index.create(url, width=8) as index:
        with Index.open(str(index.address)) as again:
            assert len(again) == 0
        assert "hunter2" not in f"{index!r} {index.address!r} {index.address}"
    monkeypatch.setenv("DOCS_URL", url.replace("postgres@", "nobody:swordfish@"))
    with pytest.raises(AccessError) as refused:
        Index.open("env:DOCS_URL")
    assert seen == ["hunter2", "hunter2", "swordfish"]
    assert "swordfish" not in str(refused.value)


def test_a_password_that_the_server_checks(postgres, quick, monkeypatch):
    rules = postgres.folder / "pg_hba.conf"
    before, url = rules.read_text(), postgres.url("secret", user="guarded")
    with direct(postgres.url("x")) as connection:
        connection.execute("CREATE ROLE guarded LOGIN SUPERUSER PASSWORD 'hunter2'")
        try:
            rules.write_text(f"local all guarded scram-sha-256\n{before}")
            connection.execute("SELECT pg_reload_conf()")
            time.sleep(0.3)
            with pytest.raises(AccessError, match="no password"):
                Index.create(url, width=8)
            monkeypatch.setenv("MATRYO_POSTGRES_PASSWORD", "wrong guess")
            with pytest.raises(AccessError, match="authentication failed") as refused:
                Index.create(url, width=8)
            assert "wrong guess" not in str(refused.value)
            monkeypatch.setenv("MATRYO_POSTGRES_PASSWORD", "hunter2")
            with Index.create(url, width=8) as index:
                assert len(index) == 0
        finally:
            rules.write_text(before)
            connection.execute("SELECT pg_reload_conf()")


def test_what_is_not_ours_is_left_alone(url):
    table = url.split("table=")[1]
    with direct(url) as connection:
        connection.execute(f"CREATE TABLE {table} (x int)")
        with pytest.raises(InputError, match="a table of this name already"):
            Index.create(url, width=8)
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        connection.execute(f"DROP TABLE {table}")
        Index.create(url, width=8).close()
        with pytest.raises(InputError, match="a table of this name already"):
            Index.create(url, width=8)
        connection.execute("UPDATE matryo_indexes SET note = replace(note, '\"format\": 1', '\"format\": 9')")
        with pytest.raises(FormatError, match="of format 9"):
            Index.open(url)
        connection.execute("UPDATE matryo_indexes SET note = replace(note, '\"format\": 9', '\"format\": 1')")
        connection.execute(f"ALTER TABLE {table} DROP COLUMN vector")
        with Index.open(url) as index, pytest.raises(FormatError, match="was changed"):
            index.search(np.ones(8))


def test_a_server_without_pgvector_says_how_to_add_it(url):
    other = url.replace("/postgres?", "/bare?")
    with direct(url) as connection:
        connection.execute("DROP ROLE IF EXISTS plain")
        connection.execute("DROP DATABASE IF EXISTS bare")
        connection.execute("CREATE ROLE plain LOGIN")
        connection.execute("CREATE DATABASE bare")
        with pytest.raises(InputError, match="install pgvector on the server"):
            Index.create(other.replace("postgres@", "plain@"), width=8)
        connection.execute("DROP DATABASE bare")
