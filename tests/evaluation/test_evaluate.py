import json
from dataclasses import replace

import numpy as np
import pytest

import matryo as mt
from conftest import WordModel
from matryo.core.codecs import codec
from matryo.core.errors import InputError
from matryo.core.metrics import Judgements, Metric, judged_ranks, measure
from matryo.core.prefix import Nesting, truncate
from matryo.core.records import Retrieval
from matryo.evaluation.rows import SPEARMAN


def slow(first, second, task, metric="nDCG@10"):
    scores = first.astype(np.float64) @ second.astype(np.float64).T
    judged = task.judged
    return measure(Metric.parse(metric), judged_ranks(scores, judged.queries, judged.documents), judged)


def test_every_width_and_code_from_one_encoding(model, retrieval):
    report = mt.evaluate(model, retrieval, widths=[4, 8, 20], codes=["float16", "int8", "binary"], resamples=50)
    assert model.encoded == [40, 80]
    q, d = model.encode(retrieval.queries), model.encode(retrieval.documents)
    for width in (4, 8, 20, 32):
        a, b = truncate(q, width), truncate(d, width)
        np.testing.assert_allclose(report.per_query[f"words {width}:float32"]["nDCG@10"], slow(a, b, retrieval))
        for code in ("float16", "int8"):
            fitted = codec(code, width).fit(b)
            expected = slow(a, truncate(fitted.decode(fitted.encode(b)), width), retrieval)
            np.testing.assert_allclose(report.per_query[f"words {width}:{code}"]["nDCG@10"], expected)
    expected = slow(np.where(q[:, :8] > 0, 1, -1), np.where(d[:, :8] > 0, 1, -1), retrieval)
    np.testing.assert_allclose(report.per_query["words 8:binary"]["nDCG@10"], expected)
    binary = report.select(code="binary")
    assert [(row.width, row.bytes) for row in binary] == [(8, 1), (32, 4)]
    assert any("no binary row: 4, 20" in note for note in report.notes)
    assert {row.width: row.bytes for row in report.select(code="int8")} == {4: 4, 8: 8, 20: 20, 32: 32}


def test_rows_say_what_was_trained_kept_and_gained(model, retrieval):
    report = mt.evaluate(model, retrieval, widths=[4, 20], resamples=200)
    mine = {row.width: row for row in report.select(model="words")}
    assert {w: row.trained for w, row in mine.items()} == {4: True, 20: False, 32: True}
    assert all(row.low <= row.value <= row.high for row in report.rows)
    assert mine[32].share == pytest.approx(1)
    assert (mine[32].share_low, mine[32].share_high) == pytest.approx((1, 1))
    assert mine[4].share == pytest.approx(mine[4].value / mine[32].value)
    assert mine[4].versus == "PCA 4:float32"
    pca = next(row for row in report.select(model="PCA") if row.width == 4)
    assert pca.trained is None
    assert pca.versus == "words 4:float32"
    assert pca.difference == pytest.approx(-mine[4].difference)
    assert pca.difference_low == pytest.approx(-mine[4].difference_high)
    assert report.paired(mine[4], "PCA 4") == (mine[4].difference, mine[4].difference_low, mine[4].difference_high)
    assert report.paired(mine[4], mine[4]) == (0, 0, 0)
    # PCA that takes no mean off is a rotation at full width: nothing is lost there.
    np.testing.assert_allclose(
        report.per_query["PCA 32:float32"]["nDCG@10"], report.per_query["words 32:float32"]["nDCG@10"]
    )


def test_default_widths_are_trained_ones_powers_of_two_and_full(model, retrieval):
    report = mt.evaluate(model, retrieval, baselines=(), resamples=10)
    assert [(row.width, row.trained) for row in report.select()] == [(4, True), (8, True), (16, False), (32, True)]
    plain = mt.evaluate(
        (np.eye(40, 48, dtype=np.float32), np.eye(80, 48, dtype=np.float32) + 0.01), retrieval, resamples=10
    )
    assert [(r.width, r.trained) for r in plain.select(model="vectors")] == [
        (8, False),
        (16, False),
        (32, False),
        (48, True),
    ]


def test_twins_and_separately_trained_models_stand_beside(model, retrieval):
    twin = WordModel(name="other", salt="twin")
    small = {8: WordModel(8, salt="8"), 4: WordModel(4, salt="4")}
    report = mt.evaluate(
        model,
        retrieval,
        widths=[4, 8],
        twins={"un-nested, cut": twin},
        separate=small,
        baselines=("pca",),
        resamples=20,
    )
    assert report.models == ["words", "un-nested, cut", "trained at one width", "PCA"]
    assert [(r.width, r.trained) for r in report.select(model="un-nested, cut")] == [(4, False), (8, False), (32, True)]
    assert [(r.width, r.trained) for r in report.select(model="trained at one width")] == [(4, True), (8, True)]
    assert report.select(model="words")[0].versus == "un-nested, cut 4:float32"
    picked = mt.evaluate(model, retrieval, widths=[8], against="random projection", resamples=20)
    assert picked.rows[0].versus == "random projection 8:float32"
    with pytest.raises(InputError, match="for width 16 gives vectors of 8"):
        mt.evaluate(model, retrieval, separate={16: small[8]})


def test_scored_pairs(model, pairs):
    from scipy.stats import spearmanr

    # Noise keeps cosines apart: equal sentences would tie up to rounding only.
    rng = np.random.default_rng(5)
    first, second = (
        model.encode(t) + rng.standard_normal((50, 32)).astype(np.float32) for t in (pairs.first, pairs.second)
    )
    report = mt.evaluate((first, second), pairs, widths=[8], codes=("int8", "binary"), resamples=100, name="words")
    a, b = truncate(first, 8), truncate(second, 8)
    row = report.select(model="words", code="float32")[0]
    assert row.metric == SPEARMAN
    assert row.value == pytest.approx(spearmanr((a * b).sum(axis=1), pairs.scores).statistic)
    assert row.low < row.value < row.high
    hamming = ((a > 0) == (b > 0)).sum(axis=1)
    binary = report.select(model="words", code="binary")[0]
    assert binary.value == pytest.approx(spearmanr(hamming, pairs.scores).statistic)
    assert "50 second-sentence vectors" in report.table()


def test_the_same_seed_gives_the_same_report(model, retrieval):
    first, again = (mt.evaluate(model, retrieval, resamples=50, seed=5).to_json(per_query=True) for _ in range(2))
    assert first == again
    assert first != mt.evaluate(model, retrieval, resamples=50, seed=6).to_json(per_query=True)


def test_pca_says_what_it_was_fitted_on(model, retrieval):
    train = np.random.default_rng(0).standard_normal((12, 32)).astype(np.float32)
    report = mt.evaluate(model, retrieval, widths=[4, 16], fit_vectors=train, resamples=10)
    assert any("12 training vectors" in note and "12 components" in note for note in report.notes)
    assert [row.width for row in report.select(model="PCA")] == [4]
    report = mt.evaluate(model, retrieval, widths=[4], resamples=10)
    assert any("80 document vectors of this task" in note for note in report.notes)


def test_encoders_with_roles_and_depths(retrieval):
    class Roles(WordModel):
        depths = (2, 4)

        def __init__(self):
            super().__init__(8)
            self.depths, self.asked = (2, 4), []

        def encode_query(self, texts, depth=None):
            self.asked.append(("query", depth))
            return self.encode(texts)

        def encode_document(self, texts, depth=None):
            self.asked.append(("document", depth))
            return self.encode(texts)

    model = Roles()
    report = mt.evaluate(model, retrieval, depths=[2], baselines=(), resamples=10)
    assert model.asked == [("query", None), ("document", None), ("query", 2), ("document", 2)]
    assert report.models == ["words", "words, 2 layers"]
    with pytest.raises(InputError, match=r"depth 3 .*offers \[2, 4\]"):
        mt.evaluate(model, retrieval, depths=[3])


def test_a_task_may_be_a_path(tmp_path, model):
    for name, rows in (
        ("corpus.jsonl", [{"_id": f"d{n}", "text": f"w{n} w{n + 1}"} for n in range(20)]),
        ("queries.jsonl", [{"_id": f"q{n}", "text": f"w{n}"} for n in range(5)]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels").mkdir()
    lines = "".join(f"q{n}\td{n}\t1\n" for n in range(5))
    (tmp_path / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    report = mt.evaluate(model, tmp_path, split="dev", metric="MRR@5", further=(), resamples=10)
    assert (report.task, report.metric, report.metrics) == (tmp_path.name, "MRR@5", ["MRR@5"])
    sts = [{"sentence1": f"w{n}", "sentence2": "w1 w2", "score": n} for n in range(5)]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sts))
    assert mt.evaluate(model, tmp_path / "sts.jsonl", baselines=(), resamples=10).kind == "scored pairs"


def test_blank_documents_are_never_encoded_never_found_and_stay_in_the_denominator(model, retrieval):
    """The shape of Cranfield: a blank document that is relevant, and one that no query asks for."""
    judged = Judgements(
        np.r_[0, np.arange(40)], np.r_[3, np.arange(40)], np.r_[2.0, np.ones(40)], 40
    )  # query 0 has two relevant documents, 3 the better
    documents = list(retrieval.documents)
    documents[3] = documents[70] = ""
    task = replace(retrieval, judged=judged, documents=documents)
    codes = ("int8", "binary")
    report = mt.evaluate(model, task, widths=[4], codes=codes, resamples=20)
    assert model.encoded == [40, 78]
    kept = [n for n in range(80) if n not in (3, 70)]
    q, d = model.encode(retrieval.queries), model.encode([documents[n] for n in kept])
    # By hand: the documents left, query 0 with its one findable document, query 3 with none.
    scores = truncate(q, 32).astype(np.float64) @ truncate(d, 32).astype(np.float64).T
    recall = report.per_query["words 32:float32"]["recall@10"]
    for n in range(40):
        found = n != 3 and (scores[n] > scores[n, kept.index(n)]).sum() < 10
        assert recall[n] == (found / 2 if n == 0 else found)
    assert all(report.per_query[f"words 32:{code}"]["recall@100"][3] == 0 for code in ("float32", *codes))
    assert report.per_query["PCA 4:float32"]["recall@100"][3] == 0
    assert report.counts["documents"] == 80
    assert json.loads(report.to_json())["counts"]["blank documents"] == 2
    assert "Documents without title and text: 2 of 80 (d3, d70)" in report.table()
    assert "(2)" in next(note for note in report.notes if "never found" in note)
    # Ready vectors may hold a row for each document, that of a blank one included, or leave those out.
    whole = np.full((80, 32), np.nan, np.float32)
    whole[kept] = d
    for second in (whole, d):
        again = mt.evaluate((q, second), task, widths=[4], codes=codes, resamples=20, name="words")
        assert [row.value for row in again.rows] == [row.value for row in report.rows]
    with pytest.raises(InputError, match="documents: 78 texts but 79 vectors"):
        mt.evaluate((q, np.ones((79, 32), np.float32)), task)
    with pytest.raises(InputError, match="every document is blank"):
        mt.evaluate(model, replace(task, documents=[" "] * 80))
    assert "blank" not in mt.evaluate(model, retrieval, resamples=20).table()


def bad(retrieval: Retrieval, **changes) -> Retrieval:
    return replace(retrieval, **changes)


def test_bad_input_is_one_line_that_names_it(model, retrieval, pairs, tmp_path):
    q, d = model.encode(retrieval.queries), model.encode(retrieval.documents)
    broken = d.copy()
    broken[7, 3] = np.nan
    silent = q.copy()
    silent[2] = 0
    cases = [
        (lambda: mt.evaluate((q, broken), retrieval), "documents: row 7 holds NaN or Inf"),
        (lambda: mt.evaluate((silent, d), retrieval), "queries: row 2 is all zeros"),
        (lambda: mt.evaluate((q, d[:, :16]), retrieval), "queries have 32 dimensions and documents 16"),
        (lambda: mt.evaluate((q[:9], d), retrieval), "queries: 40 texts but 9 vectors"),
        (lambda: mt.evaluate((q, d), retrieval, widths=[64]), r"width 64 is outside 1\.\.32"),
        (lambda: mt.evaluate((q, d), retrieval, widths=[True]), "width must be an integer"),
        (lambda: mt.evaluate("model", retrieval), "expected a model with encode"),
        (lambda: mt.evaluate(model, 3), "a task is a Retrieval or ScoredPairs set or a path, got int"),
        (lambda: mt.evaluate(model, tmp_path / "none"), "no such task"),
        (lambda: mt.evaluate(model, retrieval, depths=[3]), "has none"),
        (lambda: mt.evaluate(model, retrieval, codes=["int3"]), "unknown code 'int3'"),
        (lambda: mt.evaluate(model, retrieval, baselines=["svd"]), "use pca or random"),
        (lambda: mt.evaluate(model, retrieval, metric="P@10"), "unknown metric"),
        (lambda: mt.evaluate(model, retrieval, against="umap"), "use one of PCA, random projection"),
        (lambda: mt.evaluate(model, retrieval, name="PCA"), "two systems are called 'PCA'"),
        (lambda: mt.evaluate(model, retrieval, resamples=1), "resamples must be at least 2"),
        (lambda: mt.evaluate(model, bad(retrieval, queries=["", *retrieval.queries[1:]])), r"queries\[0\] is empty"),
        (lambda: mt.evaluate(model, bad(retrieval, documents=["x"])), "1 documents but 80 ids"),
        (lambda: mt.evaluate(model, bad(retrieval, queries=["x"])), "1 queries but judgements for 40"),
        (lambda: mt.evaluate(model, replace(pairs, second=["x"])), "must be as many"),
        (lambda: Judgements(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), 0), "no query has a relevant"),
        (lambda: mt.evaluate(WordModel(nesting=Nesting([4, 16])), retrieval), "nesting ends at width 16"),
    ]
    for call, said in cases:
        with pytest.raises(InputError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert model.encoded.count(80) == 3, "nothing is encoded before the arguments are checked"
