import numpy as np
import pytest
import pytrec_eval

from matryo.core.errors import InputError
from matryo.core.metrics import Judgements, Metric, check_metrics, judged_ranks, measure, ranks_in_row

NAMES = {"nDCG": "ndcg_cut", "recall": "recall", "mAP": "map_cut", "MRR": "recip_rank"}


def random_run(rng: np.random.Generator):
    """Grades and coarse scores, so that most runs have ties; ids whose order is that of trec_eval's tie-break."""
    queries, documents = int(rng.integers(1, 8)), int(rng.integers(1, 40))
    grades = rng.choice([0, 0, 0, 1, 2, 3], (queries, documents))
    grades[np.arange(queries), rng.integers(0, documents, queries)] = 1
    scores = rng.integers(0, int(rng.choice([3, 10, 1000])), (queries, documents)).astype(np.float32)
    # trec_eval breaks ties by the larger id first; ours is the lower position first, so ids fall as positions rise.
    ids = [f"d{documents - n:04d}" for n in range(documents)]
    return grades, scores, ids


def test_against_trec_eval_over_random_runs_with_ties_and_missing_queries():
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(1000):
        grades, scores, ids = random_run(rng)
        queries, documents = np.nonzero(grades)
        judged = Judgements(queries, documents, grades[queries, documents].astype(float), len(grades))
        ranks = judged_ranks(scores, queries, documents)
        k = int(rng.integers(1, 15))
        missing = rng.random(len(grades)) < 0.2
        # A query the system returned nothing for: all its judged documents stand beyond every cut.
        ranks[missing[queries]] = np.iinfo(np.int32).max
        qrel = {f"q{q}": {ids[d]: int(g) for d, g in enumerate(row)} for q, row in enumerate(grades)}
        run = {f"q{q}": dict(zip(ids, map(float, row), strict=True)) for q, row in enumerate(scores) if not missing[q]}
        wanted = {f"{NAMES[n]}.{k}" for n in ("nDCG", "recall", "mAP")} | {"recip_rank"}
        theirs = pytrec_eval.RelevanceEvaluator(qrel, wanted).evaluate(run)
        for name, column in NAMES.items():
            ours = measure(Metric(name, k), ranks, judged)
            for q, value in enumerate(ours):
                key = column if name == "MRR" else f"{column}_{k}"
                expected = theirs[f"q{q}"][key] if f"q{q}" in theirs else 0.0
                if name == "MRR" and expected < 1 / k - 1e-12:
                    expected = 0.0
                assert value == pytest.approx(expected, abs=1e-9), (name, k, q)
                compared += 1
    assert compared > 10_000


def test_against_ir_measures_by_its_names():
    import ir_measures

    rng = np.random.default_rng(1)
    grades, scores, ids = random_run(rng)
    queries, documents = np.nonzero(grades)
    judged = Judgements(queries, documents, grades[queries, documents].astype(float), len(grades))
    ranks = judged_ranks(scores, queries, documents)
    qrels = [ir_measures.Qrel(f"q{q}", ids[d], int(grades[q, d])) for q, d in np.ndindex(grades.shape)]
    run = [ir_measures.ScoredDoc(f"q{q}", ids[d], float(scores[q, d])) for q, d in np.ndindex(scores.shape)]
    for ours, theirs in (("nDCG@10", "nDCG@10"), ("recall@5", "R@5"), ("mAP@10", "AP@10"), ("MRR@10", "RR@10")):
        expected = ir_measures.calc_aggregate([ir_measures.parse_measure(theirs)], qrels, run)
        assert measure(Metric.parse(ours), ranks, judged).mean() == pytest.approx(
            next(iter(expected.values())), abs=1e-9
        )


def test_sorting_a_row_gives_what_comparing_gives():
    rng = np.random.default_rng(2)
    for _ in range(200):
        row = rng.integers(0, 5, 30).astype(np.float32)
        documents = rng.permutation(30)[:12]
        each = [ranks_in_row(row, documents[n : n + 1])[0] for n in range(12)]
        np.testing.assert_array_equal(ranks_in_row(row, documents), each)


def test_no_pairs_no_ranks():
    assert judged_ranks(np.ones((1, 3), np.float32), np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("text", ["nDCG@10", "recall@100", "MRR@1", "mAP@5"])
def test_a_metric_prints_as_it_is_typed(text):
    assert str(Metric.parse(text)) == text
    assert str(Metric.parse(text.lower())) == text
    assert check_metrics([text, Metric.parse(text)]) == [Metric.parse(text)] * 2


@pytest.mark.parametrize("text", ["nDCG", "nDCG@0", "ndcg@-1", "P@10", "", "nDCG@10@10"])
def test_bad_metrics_are_refused(text):
    with pytest.raises(InputError, match="nDCG@10, recall@10"):
        Metric.parse(text)


def test_bad_metric_value():
    with pytest.raises(InputError, match="unknown metric"):
        Metric("nDCG", 0)


@pytest.mark.parametrize(
    ("queries", "grades", "count", "said"),
    [
        ([], [], 0, "no query has a relevant"),
        ([1, 0], [1, 1], 2, "sorted by query"),
        ([0, 2], [1, 1], 3, "sorted by query"),
        ([0, 1], [1, 0], 2, "grade above 0"),
    ],
)
def test_bad_judgements_are_refused(queries, grades, count, said):
    with pytest.raises(InputError, match=said):
        Judgements(np.array(queries, np.int64), np.zeros(len(queries), np.int64), np.array(grades, float), count)
