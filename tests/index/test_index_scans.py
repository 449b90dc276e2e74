"""Every code under every scan obeys the same laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_contract import Stored, names, rows, rows_of, unit

from matryo.core.errors import InputError
from matryo.core.plan import Plan, Stage
from matryo.index import Index
from matryo.index.funnel import CODES, SCANS
from matryo.index.scans import scanner as module
from matryo.index.scans.cells import Cells
from matryo.index.scans.common import Allowed, first, settled
from matryo.index.scans.graph import Graph
from matryo.index.scans.scanner import Scanner, sealed_name, stage_of

N, MORE, QUERIES = 500, 60, 4
WRITTEN = {
    "flat": "flat",
    "hnsw": "hnsw(M=8,ef=40)",
    "ivf": "ivf(cells=6,probe=5)",
}
PAIRS = [
    *((code.replace("<bytes>", "8"), WRITTEN[scan]) for scan, codes in SCANS.items() for code in codes),
    ("pq8", "ivf(cells=6,probe=5,at=16)"),
    ("int8", "ivf(cells=6,probe=5,at=16)"),
]
ENOUGH = {"binary": 300, "rabitq": 200, "pq8": 150}
"""What the rough codes must keep of 500 rows to find all ten best ones."""
EXACT = "64:float32"


def plan_of(code: str, scan: str, keep: int) -> str:
    return f"32:{code} {scan} keep {keep} > {EXACT}"


def fill(index: Index, first_row: int, count: int) -> None:
    wanted = range(first_row, first_row + count)
    index.upsert([f"d{i}" for i in wanted], rows(N + MORE)[first_row:][:count], metadata=[{"m": i % 3} for i in wanted])


def recall(found: list[list[str]], truth: list[list[str]]) -> float:
    return float(np.mean([len(set(a) & set(b)) / max(1, len(b)) for a, b in zip(found, truth, strict=True)]))


@pytest.mark.parametrize(("code", "scan"), PAIRS)
def test_every_code_under_every_scan(tmp_path, code, scan):
    queries = rows(QUERIES, seed=9)
    enough = plan_of(code, scan, ENOUGH.get(code, 60))
    everything = plan_of(code, scan, 10_000)
    good = 0.75 if "ivf" in scan else 0.9  # the cell left out holds near rows too
    with Index.create(tmp_path / "i", width=64, plan=enough) as index:
        fill(index, 0, N)
        for where in (None, {"m": 1}):
            exact = index.search(queries, 10, plan=EXACT, where=where)
            assert index.search(queries, 10, plan=everything, where=where) == exact
        exact = index.search(queries, 10, plan=EXACT)
        found = index.search(queries, 10)
        assert recall(found.ids, exact.ids) >= good
        # The scan itself confined to a filter: many matches and few.
        for share in (2, 40):
            mask = np.arange(N) % share == 1
            for query, got in zip(unit(queries).astype(np.float32), scanned(index, enough, queries, mask), strict=True):
                assert mask[got].all()
                assert len(got) == min(Plan.parse(enough).stages[0].keep, mask.sum())
                best = np.flatnonzero(mask)[np.argsort(-(unit(rows(N + MORE))[:N] @ query)[mask])[:5]]
                assert len(set(best) & set(got.tolist())) >= 4
        gone = [key for ids in found.ids for key in ids[:3]]
        assert index.delete(gone) == len(set(gone))
        after = index.search(queries, 10)
        assert not set(gone) & {key for ids in after.ids for key in ids}
        assert recall(after.ids, index.search(queries, 10, plan=EXACT).ids) >= good
        fill(index, N, MORE)
        late = rows(N + MORE)[N:]
        assert index.search(late, 1).ids == [[f"d{i}"] for i in range(N, N + MORE)]
        last = index.search(queries, 10)
        assert index.search(queries[1], 10).ids == last.ids[1:2]
    with Index.open(tmp_path / "i", read_only=True) as index:
        assert index.search(queries, 10) == last
        assert index.check().ok
        held = index.stats()["codes"]
    # Every cached file, with a byte flipped, is noticed and made again.
    for path in (tmp_path / "i" / "codes").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with Index.open(tmp_path / "i") as index:
        report = index.check()
        assert report.ok
        assert any("will be made again" in note for note in report.notes)
        found = index.search(queries, 10)
        assert recall(found.ids, index.search(queries, 10, plan=EXACT).ids) >= good
        assert index.search(late, 1).ids == [[f"d{i}"] for i in range(N, N + MORE)]
        assert set(index.stats()["codes"]) == set(held)
        assert index.compact() == len(set(gone))
        assert recall(index.search(queries, 10).ids, index.search(queries, 10, plan=EXACT).ids) >= good


def scanned(index: Index, plan: str, queries: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """What the first stage alone hands on, confined to a mask (a search scores few matches without it)."""
    from matryo.index.snapshot import View

    stage = Plan.parse(plan).stages[0]
    snapshot = index.snapshot()
    return rows_of(View(snapshot, Allowed(mask)).scan(stage, unit(queries).astype(np.float32), stage.keep))


@pytest.mark.parametrize(("code", "scan"), [pair for pair in PAIRS if pair[1] == "flat"])
def test_a_flat_scan_hands_on_the_lowest_of_equal_rows(tmp_path, code, scan):
    with Index.create(tmp_path / "i", width=64) as index:
        index.upsert(names(90), np.repeat(rows(3), 30, axis=0))
        query = rows(1)
        for keep in (10, 20):
            got = scanned(index, plan_of(code, scan, keep), query, np.arange(90) != 4)
            assert got[0].tolist() == [i for i in range(keep + 1) if i != 4]


@given(
    scores=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    n=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_settled_breaks_ties_as_a_stable_sort(scores, n, seed):
    values = np.array(scores, np.float32)
    rng = np.random.default_rng(seed)

    def search(ask: int) -> tuple[np.ndarray, np.ndarray]:
        mixed = rng.permutation(len(values))
        order = mixed[np.argsort(-values[mixed], kind="stable")][:ask]
        return values[order], order

    kept, found = settled(search, n, len(values))
    assert found.tolist() == sorted(np.argsort(-values, kind="stable")[:n].tolist())
    np.testing.assert_array_equal(kept, values[found])


def parsed(text: str) -> Stage:
    return Plan.parse(text).stages[0]


@pytest.mark.parametrize(
    "text", ["32:pq8", "32:int4", "32:rabitq", "32:int8 hnsw(M=8)", "32:int4 ivf(cells=5,probe=5)"]
)
def test_a_long_tail_is_merged_aside_and_nothing_changes_but_speed(text, monkeypatch):
    monkeypatch.setattr(module, "TAIL_LEAST", 50)
    stored, queries = Stored(unit(rows(700)).astype(np.float32)), unit(rows(3, seed=5)).astype(np.float32)
    scan = Scanner(parsed(text))
    assert len(rows_of(scan.scan(parsed(text), queries, 20, stored, 400, None))[0]) == 20
    assert (scan.rows, scan.end) == (400, 400)
    scan.cover(stored, 430)
    scan.wait()
    assert (scan.rows, scan.end) == (400, 430)  # a short tail stays one
    scan.cover(stored, 520)
    scan.wait()
    assert (scan.rows, scan.end) == (520, 520)
    older = rows_of(scan.scan(parsed(text), queries, 300, stored, 450, None))
    assert all(found.max() < 450 and len(found) == 300 for found in older)  # a reader of an earlier commit
    got = rows_of(scan.scan(parsed(text), queries, 100, stored, 700, None))
    scan.wait()
    for query, found in zip(queries, got, strict=True):
        order = np.argsort(-(stored.base @ query))
        assert len(set(order[:10].tolist()) & set(found.tolist())) >= 6
    # Grown past twice its size it was trained anew.
    scan.cover(stored, 700)
    scan.wait()
    assert scan.rows + scan._pair[1].rows == 700


def test_fewer_rows_than_cells_are_all_tail():
    stored, queries = Stored(unit(rows(30)).astype(np.float32)), unit(rows(2, seed=5)).astype(np.float32)
    stage = parsed("32:int8 ivf(cells=20,probe=2)")
    scan = Scanner(stage)
    early = rows_of(scan.scan(stage, queries, 5, stored, 19, None))
    assert scan.sealed is None
    flat = [np.sort(np.argsort(-(stored.base[:19, :32] @ query[:32]))[:5]) for query in queries]
    assert sum(len(set(a) & set(b)) for a, b in zip(early, flat, strict=True)) >= 8
    scan.scan(stage, queries, 5, stored, 30, None)
    assert scan.rows == 30


def test_probes_grow_until_enough_rows_are_found():
    stored, query = Stored(unit(rows(200)).astype(np.float32)), unit(rows(1, seed=5)).astype(np.float32)[0]
    cells = Cells.build(parsed("32:int8 ivf(cells=50,probe=1)"), stored, 200)
    scores, found = cells.search(query[None], 60, None, {"probe": 1})[0]
    assert len(found) == 60
    few = Allowed(np.arange(200) % 20 == 0)
    assert cells.search(query[None], 60, few, {"probe": 1})[0][1].tolist() == list(range(0, 200, 20))
    assert len(scores) == 60


def test_a_selective_filter_leaves_the_graph_aside():
    stored, query = Stored(unit(rows(600)).astype(np.float32)), unit(rows(1, seed=5)).astype(np.float32)[0]
    graph = Graph.build(parsed("32:float32 hnsw(M=4)"), stored, 600)
    mask = np.arange(600) % 30 == 7
    scores, found = graph.search(query[None], 5, Allowed(mask), {"ef": 5})[0]
    prefix = stored.base[:, :32] / np.linalg.norm(stored.base[:, :32], axis=1, keepdims=True)
    products = np.where(mask, prefix @ query[:32], -9)
    assert found.tolist() == np.sort(np.argsort(-products)[:5]).tolist()
    np.testing.assert_allclose(scores, products[found], rtol=1e-5)
    assert graph.search(query[None], 5, Allowed(np.zeros(600, bool)), {})[0][1].tolist() == []


@pytest.mark.parametrize(("code", "scan"), [pair for pair in PAIRS if pair[1] != "flat" or pair[0] in ("pq8", "int4")])
def test_rows_written_after_something_was_built_are_found_by_their_own_vectors(tmp_path, code, scan):
    late = rows(N + MORE)[N:]
    with Index.create(tmp_path / "i", width=64, plan=plan_of(code, scan, 40)) as index:
        fill(index, 0, N)
        index.search(late[0])
        fill(index, N, MORE)
        found = index.search(late, 1)
        assert np.mean([ids == [f"d{N + n}"] for n, ids in enumerate(found.ids)]) >= 0.9


def test_what_a_search_built_is_there_at_the_next_opening(tmp_path, monkeypatch):
    plan = plan_of("int8", "hnsw(M=8,ef=40)", 40)
    with Index.create(tmp_path / "i", width=64) as index:
        fill(index, 0, N)
    with Index.open(tmp_path / "i") as index:
        before = index.search(rows(QUERIES, seed=9), plan=plan)
    monkeypatch.setattr(module, "build", lambda *_: pytest.fail("built again"))
    with Index.open(tmp_path / "i", read_only=True) as index:
        assert index.search(rows(QUERIES, seed=9), plan=plan) == before


def test_what_is_built_has_a_name_without_what_a_query_may_choose():
    for text in ("64:int8 hnsw(M=9,ef=80)", "64:int8 hnsw(ef=9,M=9)"):
        assert sealed_name(parsed(text)) == "int8 hnsw(M=9)"
    assert sealed_name(parsed("64:pq8 ivf(probe=3,cells=9,at=8)")) == "pq8 ivf(at=8,cells=9)"
    assert sealed_name(parsed("64:pq8 keep 4")) == "pq8 flat"
    for name in ("int8 hnsw(M=9)", "pq8 ivf(at=8,cells=9)", "pq8 flat", "int8 hnsw"):
        assert sealed_name(stage_of(64, name)) == name


def test_searches_with_other_ef_share_one_graph(tmp_path):
    with Index.create(tmp_path / "i", width=64) as index:
        fill(index, 0, 200)
        for ef in (20, 40):
            index.search(rows(1), plan=f"32:int8 hnsw(M=8,ef={ef}) keep 20 > {EXACT}")
        assert list(index.stats()["codes"]) == ["32:int8 hnsw(M=8)"]


@pytest.mark.parametrize(
    ("code", "each"),
    # Packed codes lie in blocks of 32 rows, with the row's number (8 bytes) beside each.
    [("float16", 64), ("int8", 32), ("binary", 8), ("int4", 16 + 8), ("pq8", 8 + 8), ("rabitq", 4 + 8 + 8)],
)
def test_stats_say_what_a_row_takes(tmp_path, code, each):
    with Index.create(tmp_path / "i", width=64) as index:
        fill(index, 0, 480)
        index.search(rows(1), plan=plan_of(code, "flat", 20))
        (told,) = index.stats()["bytes_per_item"].values()
        assert each <= told <= each + 1


def test_an_empty_index_and_one_row(tmp_path):
    with Index.create(tmp_path / "i", width=64) as index:
        plans = [plan_of(code, scan, 5) for code, scan in PAIRS]
        for plan in plans:
            assert index.search(rows(1), plan=plan).ids == [[]]
        index.upsert(["a"], rows(1))
        for plan in plans:
            assert index.search(rows(1, seed=2), plan=plan).ids == [["a"]]
        index.upsert(names(12)[1:], rows(12)[1:])
        for plan in plans:
            assert len(index.search(rows(1, seed=2), k=5, plan=plan).ids[0]) == 5


def test_a_prefix_of_zeros_scans_as_ties(tmp_path):
    base, query = rows(60), rows(1, seed=4)
    base[10:20, :32] = 0
    query[:, :32] = 0
    with Index.create(tmp_path / "i", width=64) as index:
        index.upsert(names(60), base)
        for code, scan in PAIRS:
            hits = index.search(query, k=4, plan=plan_of(code, scan, 20))
            assert len(hits.ids[0]) == 4
            assert np.isfinite(hits.scores).all()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(30, 200),
    barred=st.integers(0, 25),
    keep=st.integers(1, 29),
    code=st.sampled_from([code.replace("<bytes>", "8") for code in CODES]),
    seed=st.integers(0, 50),
)
def test_a_flat_scan_never_hands_on_fewer_than_it_may_nor_what_it_must_not(n, barred, keep, code, seed):
    stored, queries = Stored(unit(rows(n, seed)).astype(np.float32)), unit(rows(2, seed + 1)).astype(np.float32)
    mask = np.ones(n, bool)
    mask[np.random.default_rng(seed).permutation(n)[:barred]] = False
    stage = parsed(f"32:{code}")
    for found in rows_of(Scanner(stage).scan(stage, queries, keep, stored, n, Allowed(mask))):
        assert len(found) == min(keep, mask.sum())
        assert mask[found].all()
        assert (np.diff(found) > 0).all()


def test_first_orders_rows_and_keeps_the_lower_of_equals():
    scores, found = first(np.array([3, 1, 1, 2], np.float32), np.array([9, 8, 2, 5]), 3)
    assert found.tolist() == [2, 5, 9]
    assert scores.tolist() == [1, 2, 3]


def test_too_wide_a_plan_is_refused(tmp_path):
    with (
        Index.create(tmp_path / "i", width=64) as index,
        pytest.raises(InputError, match=r"width 128 is outside 1..64"),
    ):
        index.search(rows(1), plan="128:int8 hnsw keep 9 > 128:float32")
