"""Graphs and cells are built aside: no search waits for one, and none is built twice."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from index_contract import Stored, names, rows, rows_of, unit

from matryo.core.errors import DamagedError
from matryo.core.plan import Plan
from matryo.index import Index
from matryo.index.scans import scanner as module
from matryo.index.scans.scanner import Scanner

N = 600
GRAPH, CELLS = "32:int8 hnsw(M=8,ef=40)", "32:int8 ivf(cells=6,probe=6)"


@pytest.fixture
def gate(monkeypatch):
    """Builds of more than 100 rows go aside and wait for this event; `gate.begun` says that one has begun."""
    opened, begun, build = threading.Event(), threading.Event(), module.build

    def later(stage, vectors, end):
        begun.set()
        while not opened.wait(0.01):
            vectors.chunk(0, 1)
        return build(stage, vectors, end)

    monkeypatch.setattr(module, "AT_ONCE", 100)
    monkeypatch.setattr(module, "build", later)
    opened.begun = begun
    yield opened
    opened.set()


@pytest.mark.parametrize("text", [GRAPH, CELLS])
def test_searches_are_exact_while_it_is_built_and_go_on_through_it(gate, text):
    stored, queries = Stored(unit(rows(N)).astype(np.float32)), unit(rows(5, seed=5)).astype(np.float32)
    stage = Plan.parse(text).stages[0]
    scan = Scanner(stage)
    early = rows_of(scan.scan(stage, queries, 10, stored, 400, None))
    assert gate.begun.wait(5)
    assert scan.sealed is None
    truth = [np.sort(np.argsort(-(unit(stored.base[:400, :32]) @ unit(query[None, :32])[0]))[:10]) for query in queries]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(early, truth, strict=True)]) > 9.5
    # Rows written meanwhile are found too, and belong to the tail afterwards.
    more = rows_of(scan.scan(stage, queries, 10, stored, N, None))
    assert scan.sealed is None
    assert scan.end == N
    gate.set()
    scan.wait()
    assert (scan.rows, scan.end) == (400, N)
    late = rows_of(scan.scan(stage, queries, 10, stored, N, None))
    assert np.mean([len(set(a) & set(b)) for a, b in zip(more, late, strict=True)]) > 9


def test_one_build_at_a_time_and_none_again_after_it_failed(monkeypatch):
    begun = []

    def broken(stage, vectors, end):
        begun.append(end)
        raise DamagedError("damaged")

    monkeypatch.setattr(module, "AT_ONCE", 100)
    monkeypatch.setattr(module, "build", broken)
    stored, queries = Stored(unit(rows(N)).astype(np.float32)), unit(rows(5, seed=5)).astype(np.float32)
    stage = Plan.parse(GRAPH).stages[0]
    scan = Scanner(stage)
    for _ in range(3):
        assert len(rows_of(scan.scan(stage, queries, 10, stored, 400, None))[0]) == 10
        scan.wait()
    assert begun == [400]
    scan.scan(stage, queries, 10, stored, N, None)
    scan.wait()
    assert begun == [400, N]


def test_prepare_waits_for_it(gate):
    stored, stage = Stored(unit(rows(N)).astype(np.float32)), Plan.parse(GRAPH).stages[0]
    scan = Scanner(stage)
    threading.Timer(0.05, gate.set).start()
    scan.prepare(stored, N)
    assert scan.rows == N


@pytest.fixture
def built(tmp_path):
    with Index.create(tmp_path / "i", width=64, plan=f"{GRAPH} keep 40 > 64:float32") as index:
        index.upsert(names(N), rows(N))
    return tmp_path / "i"


def test_close_and_compact_leave_the_graph_for_the_next_to_open(built, monkeypatch):
    with Index.open(built) as index:
        index.delete([names(N)[3]])
        index.compact()

    def never(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(module, "build", never)
    with Index.open(built, read_only=True) as index:
        assert len(index.search(rows(3, seed=9), 10)) == 3
        assert index._seen[1].codes.scanner(32, "int8 hnsw(M=8)").rows == N - 1


def test_closing_ends_a_build(built, gate):
    for file in (built / "codes").iterdir():
        file.unlink()
    index = Index.open(built, read_only=True)
    assert len(index.search(rows(1, seed=9), 10)) == 1
    assert gate.begun.wait(5)
    building = index._seen[1].codes.scanner(32, "int8 hnsw(M=8)")._merging
    assert building.is_alive()
    index.close()
    building.join(5)
    assert not building.is_alive()
    assert not gate.is_set()


def test_calibration_measures_the_graph_and_not_the_scan_before_it(built, gate):
    for file in (built / "codes").iterdir():
        file.unlink()
    threading.Timer(0.05, gate.set).start()
    with Index.open(built) as index:
        index.calibrate(rows(300, seed=9), recall=0.8, confidence=0.9)
        assert index._seen[1].codes.scanner(32, "int8 hnsw(M=8)").rows == N


def test_recalls_are_of_the_graph_too(built, gate):
    for file in (built / "codes").iterdir():
        file.unlink()
    threading.Timer(0.05, gate.set).start()
    with Index.open(built, read_only=True) as index:
        found = index.recalls(rows(20, seed=9))(f"{GRAPH} keep 40 > 64:float32")
        assert index._seen[1].codes.scanner(32, "int8 hnsw(M=8)").rows == N
    assert found.mean() > 0.8


def test_a_program_does_not_wait_for_a_build(built, tmp_path):
    """One that ends without closing its index, while a build that would never end goes on."""
    for file in (built / "codes").iterdir():
        file.unlink()
    script = tmp_path / "ends.py"
    script.write_text(
        f"""
import time
import numpy as np
from matryo.index import Index
from matryo.index.scans import scanner

def endless(stage, vectors, end):
    while True:
        vectors.chunk(0, 1)
        time.sleep(0.01)

scanner.AT_ONCE, scanner.build = 100, endless
index = Index.open({str(built)!r}, read_only=True)
index.search(np.ones(64, np.float32), 10)
"""
    )
    subprocess.run([sys.executable, script], check=True, timeout=60)
