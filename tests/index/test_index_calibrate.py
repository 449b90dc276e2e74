"""`Index.calibrate`: the promise is kept on real vectors, in the catalogue, and said by search."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from matryo.core.errors import InputError, StorageError
from matryo.core.plan import Plan
from matryo.core.promise import p_value, sizes, smallest
from matryo.index import Index, catalogue
from matryo.index.calibration import PROFILED, SHORTER, ladder_of, recalls_of, stopping, with_keep
from matryo.index.funnel import lengths, run, stopped
from matryo.index.snapshot import View

PLAN = "32:binary keep 400 > 64:float32"


@pytest.fixture(scope="module")
def spectrum():
    """1,500 unit rows and 1,200 queries, 64 wide, clustered, with a nested model's falling spectrum."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, 65) ** -0.35
    centres = rng.standard_normal((60, 64))
    rows = (centres[rng.integers(0, 60, 2700)] + rng.standard_normal((2700, 64))) * scale
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return rows[:1500], rows[1500:]


@pytest.fixture
def index(tmp_path, spectrum):
    with Index.create(tmp_path / "index", width=64, plan=PLAN) as made:
        made.upsert([f"i{n}" for n in range(1500)], spectrum[0])
        yield made


def mean_recall(index, queries, plan=None):
    exact, found = (index.search(queries, 10, plan=which) for which in ("64:float32", plan))
    return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.ids, found.ids, strict=True)])


def test_search_uses_the_calibrated_plan_and_says_what_is_promised(index, spectrum):
    before = index.search(spectrum[1][:2], explain=True)
    assert before.promise == "nothing is promised: the index has not been calibrated; see Index.calibrate"
    promise = index.calibrate(spectrum[1][:500], recall=0.9, confidence=0.9)
    assert (promise.recall, promise.confidence, promise.k, promise.queries) == (0.9, 0.9, 10, 500)
    assert (promise.items, promise.source) == (1500, "queries")
    assert promise.measured >= promise.bound >= 0.9 - 1 / 2000
    assert index.stats()["plan"] == str(promise.plan)
    assert 10 < promise.plan.stages[0].keep < 400
    assert mean_recall(index, spectrum[1][500:]) >= 0.9
    hits = index.search(spectrum[1][:2], explain=True)
    assert hits.promise == str(promise)
    assert hits.explanation[0].kept == 2 * promise.plan.stages[0].keep
    assert index.search(spectrum[1][:2]).promise is None


def test_what_a_promise_does_not_cover_is_said(index, spectrum):
    promise = index.calibrate(spectrum[1], recall=0.9)
    index.upsert(["new"], spectrum[1][:1], metadata=[{"shelf": 1}])
    said = index.search(spectrum[1][:1], k=20, where={"shelf": 1}, explain=True).promise
    assert said.startswith(str(promise))
    assert "this search asks for 20" in said
    assert "the index has grown to 1501 items since, calibrate again" in said
    assert "a filter, which it does not cover" in said
    other = index.search(spectrum[1][:1], plan=PLAN, explain=True).promise
    assert other == f"nothing is promised of this plan; '{promise.plan}' was calibrated"


def test_the_promise_is_there_when_opened_again_and_after_writes(index, spectrum, tmp_path):
    promise = index.calibrate(spectrum[1], recall=0.8)
    index.delete(["i3"])
    index.upsert(["i4"], spectrum[1][:1])
    index.compact()
    index.close()
    with Index.open(tmp_path / "index", read_only=True) as opened:
        assert opened.stats()["promise"] == promise.as_json()
        assert opened.search(spectrum[1][0], explain=True).promise == str(promise)
        with pytest.raises(InputError, match="opened read_only"):
            opened.calibrate(spectrum[1])


def test_many_splits_keep_the_promise_at_least_as_often_as_said(index, spectrum):
    """The pool of all queries stands for the source: its mean recall is the expectation a sample is drawn from."""
    _, pool = spectrum
    view = View(index.snapshot())
    ladder = ladder_of(Plan.parse(PLAN), 10, 1500, 64)
    found = recalls_of(view, pool, 10)
    table = {plan: found(plan) for plan in ladder}
    least = next(plan for plan in ladder if table[plan].mean() >= 0.95)
    rng, kept, keeps = np.random.default_rng(1), 0, []
    for _ in range(200):
        sample = rng.permutation(len(pool))[: len(pool) // 2]
        chosen, _ = smallest(ladder, lambda plan, sample=sample: table[plan][sample], 0.95, 0.95)
        kept += table[chosen].mean() >= 0.95
        keeps.append(chosen.stages[0].keep)
    assert kept >= 190
    assert np.mean(keeps) <= 1.5 * least.stages[0].keep


def test_recall_rises_along_the_ladder_and_is_what_search_gives(index, spectrum):
    queries = spectrum[1][:60]
    found = recalls_of(View(index.snapshot()), queries, 10)
    ladder = ladder_of(Plan.parse(PLAN), 10, 1500, 64)
    tables = np.stack([found(plan) for plan in ladder])
    assert (np.diff(tables, axis=0) >= 0).all()
    assert (tables[-1] == 1).all()
    middle = len(ladder) // 2
    assert tables[middle].mean() == pytest.approx(mean_recall(index, queries, ladder[middle]))


def test_without_queries_held_out_items_are_asked_and_never_answer_themselves(index, spectrum):
    promise = index.calibrate(recall=0.9)
    assert (promise.source, promise.queries) == ("items", 1000)
    assert "1000 of its own items as queries" in str(promise)
    # Slow twin: the exact neighbours of an item among the others, and whether the shortlist holds them.
    own = np.arange(100, 160)
    view = View(index.snapshot())
    base = index.snapshot().vectors.take(np.arange(1500))
    plan = with_keep(Plan.parse(PLAN), 50, 10)
    got = recalls_of(view, base[own], 10, own)(plan)
    for row, recall in zip(own, got, strict=True):
        scores = base @ base[row]
        scores[row] = -2
        true = set(np.argsort(-scores, kind="stable")[:10])
        rows = run(plan, base[row : row + 1], 11, view)[0][0]
        assert recall == pytest.approx(len(true & set([r for r in rows if r != row][:10])) / 10)


def test_equal_vectors_stand_for_one_another(tmp_path):
    rng = np.random.default_rng(2)
    rows = np.repeat(rng.standard_normal((30, 16)).astype(np.float32), 5, axis=0)
    with Index.create(tmp_path / "twins", width=16, plan="16:float32") as index:
        index.upsert([str(n) for n in range(150)], rows)
        found = recalls_of(View(index.snapshot()), index.snapshot().vectors.take(np.arange(0, 150, 5)), 3)
        assert (found(Plan.parse("16:float16 keep 5 > 16:float32")) == 1).all()


def test_several_shortlists_shrink_in_proportion(index, spectrum):
    promise = index.calibrate(spectrum[1], recall=0.9, plan="16:binary keep 800 > 32:int8 keep 200 > 64:float32")
    first, second, last = promise.plan.stages
    assert second.keep == max(10, round(first.keep / 4))
    assert last.keep is None
    assert mean_recall(index, spectrum[1]) >= 0.9


def test_an_exact_plan_promises_at_once(index, spectrum):
    promise = index.calibrate(spectrum[1][:100], plan="64:float32")
    assert str(promise.plan) == "64:float32"
    assert promise.measured == 1


def test_what_cannot_be_calibrated_is_refused_and_changes_nothing(index, spectrum):
    before = {name: value for name, value in index.stats().items() if name not in ("codes", "bytes_per_item")}
    with pytest.raises(InputError, match=r"20 queries cannot show recall >= 0.95 at confidence 0.95.* it takes 65"):
        index.calibrate(spectrum[1][:20])
    with pytest.raises(
        InputError, match=r"cannot be promised at confidence 0.95: .* shows at least 0\.\d+; ask for that"
    ):
        # Nothing is reranked past the ten that 8 bits choose, whatever the first shortlist.
        index.calibrate(spectrum[1], plan="8:binary keep 100 > 8:binary keep 1 > 8:int8 keep 1", k=10)
    with pytest.raises(InputError, match="0 queries cannot show"):
        index.calibrate(spectrum[1][:0])
    with pytest.raises(InputError, match="row 1 holds NaN"):
        index.calibrate(np.array([[1.0] * 64, [np.nan] * 64]))
    with pytest.raises(InputError, match="row 2 is all zeros"):
        index.calibrate(np.concatenate([spectrum[1][:2], np.zeros((1, 64))]))
    with pytest.raises(InputError, match="k must be an integer of at least 1"):
        index.calibrate(spectrum[1], k=0)
    with pytest.raises(InputError, match="the index holds 1500 items and k is 1500"):
        index.calibrate(spectrum[1], k=1500)
    with pytest.raises(InputError, match=r"width 128 is outside 1\.\.64"):
        index.calibrate(spectrum[1], plan="128:binary keep 20 > 128:float32")
    assert {name: value for name, value in index.stats().items() if name not in ("codes", "bytes_per_item")} == before


def test_a_refused_commit_leaves_the_old_plan(index, spectrum, monkeypatch):
    real = catalogue.write_state

    def refused(connection, state):
        real(connection, state)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalogue, "write_state", refused)
    with pytest.raises(StorageError, match="No space left"):
        index.calibrate(spectrum[1], recall=0.9)
    monkeypatch.undo()
    assert index.stats()["plan"] == PLAN
    assert index.stats()["promise"] is None
    assert index.calibrate(spectrum[1], recall=0.9).recall == 0.9


CALIBRATE_FOR_EVER = """
import sys, numpy as np
from matryo.index import Index
queries = np.load(sys.argv[2], allow_pickle=False)
with Index.open(sys.argv[1]) as index:
    print("open", flush=True)
    while True:
        for recall in (0.7, 0.9):
            index.calibrate(queries, recall=recall, confidence=0.9, plan="32:binary keep 400 > 64:float32")
            print(recall, flush=True)
"""


def test_killed_while_calibrating_the_plan_and_its_promise_are_of_one_piece(index, spectrum, tmp_path):
    folder, queries = tmp_path / "index", tmp_path / "queries.npy"
    np.save(queries, spectrum[1][:40])
    index.close()
    rng, seen = np.random.default_rng(4), set()
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CALIBRATE_FOR_EVER, folder, queries],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        said = [child.stdout.readline().strip()]
        said += [child.stdout.readline().strip() for _ in range(int(rng.integers(0, 4)))]
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        said += child.communicate()[0].split()
        with Index.open(folder) as opened:
            assert opened.check().ok
            stats = opened.stats()
            assert len(opened) == 1500
            if stats["promise"] is None:
                assert stats["plan"] == PLAN
                assert said == ["open"]
            else:
                assert stats["promise"]["plan"] == stats["plan"]
                seen.add((stats["promise"]["recall"], stats["plan"]))
                assert json.loads(json.dumps(stats["promise"])) == stats["promise"]
    assert 1 <= len(seen) <= 2


def test_the_chosen_plan_is_the_shortest_that_passes_and_the_shorter_of_two(index, spectrum):
    promise = index.calibrate(spectrum[1], recall=0.9)
    view, plan, ladder = View(index.snapshot()), Plan.parse(PLAN), sizes(10, 1500)
    found = recalls_of(view, spectrum[1], 10)
    items = np.random.default_rng(0).permutation(1500)[:PROFILED]
    families = [
        lambda n: with_keep(plan, n, 10),
        stopping(view, view._snapshot.vectors.take(np.sort(items)), plan, 10, 1500),
    ]
    best = []
    for family in families:
        rung, _ = smallest(ladder, lambda n, family=family: found(family(n)), 0.9, 0.95, 0.5)
        shorter = family(ladder[ladder.index(rung) - 1])
        assert p_value(found(family(rung)), 0.9, 0.975) <= 0.025 < p_value(found(shorter), 0.9, 0.975)
        best.append(family(rung))
    mean = [lengths(chosen, spectrum[1], 10, view).mean() for chosen in best]
    assert promise.plan == best[int(mean[1] <= SHORTER * mean[0])]
    assert promise.shortlist == round(min(mean), 1)


def test_shortlists_that_stop_by_themselves_are_nested_and_end_with_every_row(index, spectrum):
    view = View(index.snapshot())
    for text in (PLAN, "16:int8 keep 50 > 32:int8 keep 20 > 64:float32", "32:pq8 keep 50", "32:float32 hnsw keep 50"):
        given = Plan.parse(text)
        at = stopping(view, spectrum[0][:PROFILED], given, 10, 1500)
        before = None
        for n in sizes(10, 1500)[::4]:
            plan = at(n)
            first = plan.stages[0]
            assert Plan.parse(str(plan)) == plan
            assert plan.stages[1:] == with_keep(given, n, 10).stages[1:]
            shortlists = [
                set(stopped(scores, rows, 10, first.within).tolist())
                for scores, rows in view.scan(first, spectrum[1][:20], first.keep)
            ]
            assert all(len(rows) >= 10 for rows in shortlists)
            if before is not None and "hnsw" not in text:
                assert all(a <= b for a, b in zip(before, shortlists, strict=True))
            before = shortlists
        assert at(1500) == with_keep(given, 1500, 10)


def test_explain_says_how_many_candidates_each_query_had(index, spectrum):
    plan = "32:binary keep 600 within 0.2 > 64:float32"
    hits = index.search(spectrum[1][:40], plan=plan, explain=True)
    first, last = hits.explanation
    assert sum(first.each) == first.kept == last.considered
    assert len(set(first.each)) > 5
    assert all(10 <= n <= 600 for n in first.each)
    assert last.each == [10] * 40
    # Slow twin: bits compared one by one.
    bits, asked = spectrum[0][:, :32] > 0, spectrum[1][:40, :32] > 0
    far = (asked[:, None] != bits[None]).sum(axis=2)
    edges = np.sort(far, axis=1)[:, 9]
    assert first.each == np.minimum((far <= edges[:, None] + 0.2 * 32 / 2).sum(axis=1), 600).tolist()


def test_exact_scans_take_no_distance(index):
    with pytest.raises(InputError, match=r"stage 1 .*the exact scan knows its answers; leave `within` out"):
        index.search(np.ones(64), plan="64:float32 keep 50 within 0.1")
