"""`mt.plan`: what it recommends reaches the recall when built, what it rejects has a reason."""

import itertools
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import matryo as mt
from matryo.core.errors import InputError, MissingExtraError
from matryo.core.plan import Plan, Stage
from matryo.index.funnel import check_plan
from matryo.index.scans.bounds import NAME as BOUNDS
from matryo.planner.candidates import candidates, halves, least_bytes
from matryo.planner.trial import Sample, Target


@pytest.fixture(scope="module")
def data():
    """2,000 clustered rows, 64 wide, whose spectrum falls, and 900 queries."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, 65) ** -0.4
    centres = rng.standard_normal((80, 64))
    rows = (centres[rng.integers(0, 80, 2900)] + rng.standard_normal((2900, 64))) * scale
    return rows[:2000].astype(np.float32), rows[2000:].astype(np.float32)


@pytest.fixture(scope="module")
def plans(data):
    return mt.plan(data[0], data[1][:400], recall=0.9, confidence=0.9, items="20k", budget=3600, widths=[8, 16, 32, 64])


def test_what_is_recommended_reaches_the_recall_on_new_queries_when_built(data, tmp_path):
    rows, queries = data
    found = mt.plan(rows, queries[:400], recall=0.9, confidence=0.9, widths=[16, 64], budget=3600)
    assert found.facts["sample"] == 2000
    assert found.best.plan == found.best.planned
    with mt.Index.create(tmp_path / "index", width=64, plan=found.best.plan) as index:
        index.upsert([str(n) for n in range(len(rows))], rows)
        assert index.recalls(queries[400:])(found.best.plan).mean() >= 0.9
    assert found.best.recall >= found.best.bound >= 0.9 - 1 / 2000


def test_the_frontier_is_one_and_every_plan_that_was_started_is_on_it_or_has_a_reason(plans):
    rows = plans.frontier
    assert [row.bytes_per_item for row in rows] == sorted(row.bytes_per_item for row in rows)
    assert all(a.predicted.ms > b.predicted.ms for a, b in pairwise(rows))
    assert plans.best in rows
    assert len(rows) + len(plans.rejected) == plans.facts["candidates"]
    assert all(row.reason for row in plans.rejected)
    for row in rows:
        assert [m.items for m in row.measured] == plans.facts["sizes"]
        assert row.last.ms_low <= row.last.ms <= row.last.ms_high
        assert row.predicted.items == 20_000
        assert row.predicted.keep >= row.last.keep


def test_the_full_width_is_measured_in_every_code_beside_its_prefixes():
    found = candidates(64, 1000)
    firsts = [plan.stages[0] for plan in found]
    codes = {stage.code for stage in firsts}
    assert {"binary", "int8", "float16"} <= codes
    for code in codes - {"float32"}:
        assert any(stage.width == 64 for stage in firsts if stage.code == code)
    assert Plan((Stage(64, "float32"),)) in found
    assert len({str(plan) for plan in found}) == len(found)
    for plan in found:
        assert check_plan(plan, 64) == plan
        assert least_bytes(plan) >= 0
    # At equal bytes: bits of all 64 dimensions beside two bits' worth of int4 of 16.
    by_bytes = {(s.width, s.code): least_bytes(Plan((s, Stage(64, "float32")))) for s in firsts if s.code != "float32"}
    assert by_bytes[64, "binary"] == by_bytes[16, "int4"] == 8


def test_three_stages_and_cells_at_half_the_width_take_part():
    few = [str(plan) for plan in candidates(768, 20_000)]
    assert "192:binary keep 400 > 384:int8 keep 100 > 768:float32" in few
    assert "96:binary keep 400 > 192:binary keep 100 > 768:float32" in few
    assert least_bytes(Plan.parse("192:binary keep 400 > 384:int8 keep 100 > 768:float32")) == 24 + 384
    assert not any("hnsw" in text or "cells" in text for text in few)
    many = [str(plan) for plan in candidates(768, 1_000_000)]
    assert set(few) < set(many)
    assert "384:pq32 ivf(cells=256,probe=32,at=192) keep 100 > 768:float32" in many
    assert any(text.startswith("192:int8 hnsw(") for text in many)


def test_what_a_row_costs_is_measured_over_repeated_vectors(data, tmp_path):
    rows, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in data)
    sample = Sample(tmp_path / "sample", rows[:1000], queries[:100], Target(10, 0.8, 0.9), 1000)
    trial = sample.attempt(Plan.parse("64:binary keep 50 > 64:float32"))
    vectors = trial.index.snapshot().vectors
    longer = sample._longer(vectors, 2500)
    assert longer.end == 2500
    assert np.array_equal(longer.stored, np.resize(vectors.stored, longer.stored.shape))
    assert sample.row_ms(trial, 2500) >= 0
    # Nothing more is to come; nothing is handed on.
    assert sample.row_ms(trial, 1000) == 0
    alone = sample.attempt(Plan.parse("64:float32"))
    assert sample.row_ms(alone, 2500) == 0
    for opened in (trial, alone):
        opened.index.close()


def test_exact_search_goes_by_bounds_on_a_sample_if_it_will_at_the_items_to_come(data, tmp_path):
    rows, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in data)
    exact = Plan.parse("64:float32")
    for items, derived in ((len(rows), set()), (1 << 17, {(64, BOUNDS)})):
        sample = Sample(tmp_path / str(items), rows, queries[:100], Target(10, 0.8, 0.9), items)
        trial = sample.attempt(exact)
        assert set(trial.index.snapshot().codes.loaded()) == derived
        assert sample.recalls(trial.index, exact).min() == 1
        assert (sample.scan_growth(trial, items) is None) == (not derived)
        trial.index.close()


def test_what_a_further_item_costs_is_measured_over_repeated_codes_and_changes_nothing(data, tmp_path):
    rows, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in data)
    sample = Sample(tmp_path / "s", rows, queries[:100], Target(10, 0.8, 0.9), 1000)
    for text in ("64:binary keep 100 > 64:float32", "32:int8 keep 60 > 64:float32", "16:float32 keep 60 > 64:float32"):
        trial = sample.attempt(Plan.parse(text))
        before = trial.index.search(queries[0], plan=trial.plan)
        loaded = trial.index.stats()["codes"]
        assert min(sample.scan_growth(trial, 10_000_000)) >= 0
        assert sample.scan_growth(trial, len(rows)) is None
        assert trial.index.search(queries[0], plan=trial.plan) == before
        assert trial.index.stats()["codes"] == loaded
        trial.index.close()
    graph = sample.attempt(Plan.parse("32:int8 hnsw(M=8,ef=80) keep 60 > 64:float32"))
    assert sample.scan_growth(graph, 10_000_000) is None
    graph.index.close()


def test_a_killed_plan_leaves_the_files_of_the_one_before(data, tmp_path):
    for name, content in (("vectors", data[0]), ("queries", data[1][:300])):
        np.save(tmp_path / f"{name}.npy", content)
    (tmp_path / "temporary").mkdir()
    out = tmp_path / "plan.yaml"
    out.write_text("plan: 64:float32\n")
    code = "import sys; from matryo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "plan", str(tmp_path / "vectors.npy"), str(tmp_path / "queries.npy"),
               "--recall", "0.8", "--confidence", "0.9", "--widths", "64", "--out", str(out)]  # fmt: skip
    there = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, env=there, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert "items: " in child.stderr.readline()
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert out.read_text() == "plan: 64:float32\n"
    # What it measured on lies under the temporary folder, where it takes the system's sweeping; nothing else is there.
    assert all(path.name.startswith("matryo-plan-") for path in (tmp_path / "temporary").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml", "queries.npy", "temporary", "vectors.npy"]
    assert halves(768) == [768, 384, 192, 96, 48, 24]
    assert halves(50) == [50, 24, 8]


def test_how_many_dimensions_are_needed(plans, data):
    rows, queries = data
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    asked = queries[:400] / np.linalg.norm(queries[:400], axis=1, keepdims=True)
    true = np.argsort(-(asked @ unit.T), axis=1)[:, :10]

    def recall(width, n):
        cut, short = (mt.truncate(x, width) for x in (unit, asked))
        found = np.argsort(-(short @ cut.T), axis=1)[:, :n]
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)])

    assert recall(plans.width_alone, 10) >= 0.9
    assert recall(max(8, plans.width_alone // 2), 10) < 0.9
    assert plans.width_reranked <= plans.width_alone
    assert recall(plans.width_reranked, 100) >= 0.9


def test_memory_and_latency_choose(data):
    rows, queries = data[0][:800], data[1]
    kind = {"recall": 0.8, "confidence": 0.9, "budget": 3600, "widths": [16, 64]}
    small = mt.plan(rows, queries[:300], memory="20kB", **kind)
    assert small.best.predicted.code_bytes <= 20_000
    assert any("over 20 kB" in row.reason or "no more bytes" in row.reason for row in small.rejected)
    never = mt.plan(rows, queries[:300], latency="1us", items="1M", **kind)
    assert never.choice is None
    with pytest.raises(InputError, match=r"no plan is expected within 0.001 ms at 1,000,000 items; the quickest is '"):
        _ = never.best
    loose = mt.plan(rows, queries[:300], latency="10s", **kind)
    assert loose.best == loose.frontier[0]


def test_without_queries_items_are_held_out_and_the_notes_say_so(data):
    found = mt.plan(data[0], recall=0.8, confidence=0.8, widths=[64], budget=3600)
    assert found.facts["queries"] == 400
    assert found.facts["sample"] == 1600
    assert any("for held-out items as queries" in note for note in found.notes())


def test_a_short_budget_leaves_out_what_it_must_and_says_so(data, monkeypatch):
    rows, queries = data
    ticks = itertools.count()
    # A clock that a second passes on whenever it is read, about once a plan: time for one sample, not for all promises.
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(sys.modules["matryo.planner.plan"], "time", clock)
    found = mt.plan(rows, queries[:400], recall=0.8, confidence=0.9, budget=1.8 * len(candidates(64, 2000)))
    assert found.facts["sizes"] == [250]
    assert found.best
    assert any("the budget was used up" in row.reason for row in found.rejected)
    assert len(found.frontier) + len(found.rejected) == found.facts["candidates"]
    with pytest.raises(InputError, match="the budget is too short"):
        mt.plan(rows, queries[:400], recall=0.8, confidence=0.9, budget="1ms")


def test_a_sample_that_time_ran_out_on_leaves_what_was_measured_before(data, monkeypatch):
    from matryo.planner.plan import _Run

    rows, queries = data
    measure = _Run._one_size

    def late(self, sample, alive):
        if self.sizes:
            self.deadline = -1.0
        return measure(self, sample, alive)

    monkeypatch.setattr(_Run, "_one_size", late)
    found = mt.plan(rows, queries[:400], recall=0.8, confidence=0.9, widths=[32, 64], budget=3600)
    assert found.facts["sizes"] == [250]
    assert len(found.frontier) + len(found.rejected) == found.facts["candidates"]


def test_files(plans, tmp_path):
    import yaml

    content = yaml.safe_load(plans.save(tmp_path / "plan.yaml").read_text())
    assert content["plan"] == str(plans.best.planned)
    assert content["predicted"]["items"] == 20_000
    page = plans.save(tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert str(plans.best.plan).replace(">", "&gt;") in page
    assert plans.rejected[0].reason.replace("'", "&#39;").replace(">", "&gt;") in page
    assert json.loads(plans.save(tmp_path / "all.json").read_text())["best"]["planned"] == str(plans.best.planned)
    assert str(plans.best.plan) in plans.table()
    with pytest.raises(InputError, match=r"saved as \.html, \.yaml or \.json"):
        plans.save(tmp_path / "x.txt")


def test_growth_is_said(plans):
    said = " ".join(plans.notes())
    assert "on the 2,000 items of the sample; recall at a fixed shortlist falls as items are added" in said
    assert "left out of the fit, 2,000 items were predicted within" in said
    assert "dimensions: a float32 prefix of" in said


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"queries": np.ones((20, 64))},
            r"20 queries cannot show recall >= 0.9 at confidence 0.95 for \d+ plans at once",
        ),
        ({"queries": np.ones((0, 64))}, "0 queries cannot show"),
        ({"queries": np.ones((300, 32))}, r"queries: expected \(Q, 64\) numbers, got shape \(300, 32\)"),
        ({"queries": np.full((300, 64), np.nan)}, "queries: row 0 holds NaN"),
        ({"queries": np.concatenate([np.ones((300, 64)), np.zeros((1, 64))])}, r"queries: row \d+ is all zeros"),
        ({"vectors": np.full((300, 64), np.nan)}, r"vectors \(a sample\): row 0 holds NaN"),
        ({"vectors": np.ones((30, 64))}, "30 vectors are too few to plan for k=10"),
        ({"vectors": np.ones(64)}, r"vectors: expected \(N, D\) numbers, got shape \(64,\)"),
        ({"k": 5000}, "2000 vectors are too few to plan for k=5000"),
        ({"k": 0}, "k must be an integer of at least 1"),
        ({"recall": 1}, "recall must be a number between 0 and 1, got 1"),
        ({"recall": 0.99999}, "queries cannot show recall >= 0.99999"),
        ({"memory": "1kB"}, r"memory 1 kB is below the floor: the smallest code, .* takes \d+ bytes? an item"),
        ({"widths": [0]}, r"width 0 is outside 1\.\.64"),
        ({"widths": [128]}, r"width 128 is outside 1\.\.64"),
        ({"items": 100}, "items is 100 but 2,000 vectors were given"),
        ({"latency": "fast"}, "latency must be a number above 0"),
        ({"budget": 0}, "budget must be a number above 0"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_measured(data, change, match):
    given = {"vectors": data[0], "queries": data[1][:400], "recall": 0.9, **change}
    with pytest.raises(InputError, match=match):
        mt.plan(**given)


def test_a_missing_package_names_the_extra(plans, tmp_path, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "matryo.planner.page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "matryo.pages", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'matryo\[eval\]'"):
        plans.save(tmp_path / "page.html")
