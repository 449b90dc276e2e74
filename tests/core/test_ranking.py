import sys

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from matryo.core.errors import InputError
from matryo.core.gram import check_widths, prefix_scores
from matryo.core.metrics import Judgements, Metric, judged_ranks, measure
from matryo.core.prefix import truncate
from matryo.core.ranking import NEVER, ranks_at_widths, ranks_in_task
from matryo.core.records import Retrieval
from matryo.core.topk import top_k


def judgements(rng: np.random.Generator, queries: int, documents: int, most: int) -> Judgements:
    """Between 1 and `most` judged documents for each query, in any order inside a query."""
    flat = [(q, d) for q in range(queries) for d in rng.permutation(documents)[: rng.integers(1, most + 1)]]
    q, d = np.array(flat).T
    return Judgements(q, d, np.ones(len(q)), queries)


def signs(rng: np.random.Generator, rows: int, full: int) -> np.ndarray:
    """Vectors of +-1: every product is a whole number, so that ties are exact however the sum is ordered."""
    return rng.choice([-1.0, 1.0], (rows, full)).astype(np.float32)


def slow_twin(queries, documents, judged, width):
    """Full sort of the scores of one width, ties to the lower position."""
    a, b = queries[:, :width], documents[:, :width]
    # Rows of one length: the product alone ranks, in whole numbers.
    order, _ = top_k(a @ b.T, len(documents))
    ranks = np.argsort(order, axis=1)
    return ranks[judged.queries, judged.documents]


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_ties_and_many_judged_documents_against_a_full_sort(seed, queries, documents, most, threads):
    rng = np.random.default_rng(seed)
    q, d = signs(rng, queries, 16), signs(rng, documents, 16)
    judged = judgements(rng, queries, documents, min(most, documents))
    found = ranks_at_widths(q, d, judged, [1, 4, 5, 16], threads=threads, chunk=2)
    for width, ranks in found.items():
        np.testing.assert_array_equal(ranks, slow_twin(q, d, judged, width))


@given(st.integers(0, 10_000), st.integers(1, 30))
def test_ranks_do_not_depend_on_the_chunk(seed, chunk):
    rng = np.random.default_rng(seed)
    q, d = signs(rng, 20, 32), signs(rng, 50, 32)
    judged = judgements(rng, 20, 50, 3)
    whole = ranks_at_widths(q, d, judged, [4, 9, 32], chunk=1000, threads=1)
    for width, ranks in ranks_at_widths(q, d, judged, [4, 9, 32], chunk=chunk).items():
        np.testing.assert_array_equal(ranks, whole[width])


def test_row_lengths_do_not_matter_and_every_width_is_a_cosine():
    rng = np.random.default_rng(1)
    q, d = rng.standard_normal((30, 48)).astype(np.float32), rng.standard_normal((80, 48)).astype(np.float32)
    judged = judgements(rng, 30, 80, 4)
    found = ranks_at_widths(q * 7, d * rng.uniform(0.1, 9, (80, 1)).astype(np.float32), judged, [3, 20, 48])
    for width, ranks in found.items():
        scores = truncate(q.astype(np.float64), width) @ truncate(d.astype(np.float64), width).T
        np.testing.assert_array_equal(ranks, judged_ranks(scores, judged.queries, judged.documents))


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_prefix_scores_are_the_products_of_the_prefixes(chunk):
    rng = np.random.default_rng(2)
    q, d = rng.standard_normal((20, 24)).astype(np.float32), rng.standard_normal((33, 24)).astype(np.float32)
    d[5, :4] = 0
    for rows, width, scores in prefix_scores(q, d, [4, 10, 24], chunk):
        np.testing.assert_allclose(scores, q[rows, :width] @ truncate(d, width).T, atol=1e-5)
        if width == 4:
            assert not scores[:, 5].any()


def blanked(judged: Judgements, documents: list[str]) -> Retrieval:
    ids = [f"q{n}" for n in range(judged.count)]
    return Retrieval("t", ids, ids, documents, [f"d{n}" for n in range(len(documents))], judged)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 40), st.integers(1, 12))
def test_blank_documents_rank_as_if_missing_from_the_run_of_trec_eval(seed, queries, documents, most):
    rng = np.random.default_rng(seed)
    judged = judgements(rng, queries, documents, min(most, documents))
    texts = ["" if rng.random() < 0.3 else "text" for _ in range(documents)]
    texts[rng.integers(documents)] = "text"
    task = blanked(judged, texts)
    q, d = signs(rng, queries, 16), signs(rng, documents, 16)
    # trec_eval breaks ties by the larger id first; ours is the lower position first, so ids fall as positions rise.
    ids = [f"d{documents - n:04d}" for n in range(documents)]
    qrel = {f"q{n}": {} for n in range(queries)}
    for query, document in zip(judged.queries, judged.documents, strict=True):
        qrel[f"q{query}"][ids[document]] = 1
    for width, ranks in ranks_in_task(task, q, d[task.written], [4, 16]).items():
        blank = np.array([not texts[n] for n in judged.documents])
        assert (ranks[blank] == NEVER).all()
        assert (ranks[~blank] < len(task.written)).all()
        scores = q[:, :width] @ d[:, :width].T
        run = {f"q{n}": {ids[m]: float(row[m]) for m in task.written} for n, row in enumerate(scores)}
        # A cut beyond the number of documents too: what is never found is not found there either.
        wanted = {"ndcg_cut.5,100", "recall.5,100", "map_cut.5,100", "recip_rank"}
        theirs = pytrec_eval.RelevanceEvaluator(qrel, wanted).evaluate(run)
        for ours, column in (("nDCG", "ndcg_cut"), ("recall", "recall"), ("mAP", "map_cut")):
            for k in (5, 100):
                expected = [theirs[f"q{n}"][f"{column}_{k}"] for n in range(queries)]
                np.testing.assert_allclose(measure(Metric(ours, k), ranks, judged), expected, atol=1e-9)
        expected = [theirs[f"q{n}"]["recip_rank"] for n in range(queries)]
        np.testing.assert_allclose(measure(Metric("MRR", 100), ranks, judged), expected, atol=1e-9)


def test_a_set_whose_every_relevant_document_is_blank_scores_nothing():
    judged = Judgements(np.arange(2), np.array([0, 2]), np.ones(2), 2)
    ranks = ranks_in_task(blanked(judged, ["", "x", " "]), np.eye(2, 4), np.ones((1, 4)), [2, 4])
    assert {width: found.tolist() for width, found in ranks.items()} == {2: [NEVER] * 2, 4: [NEVER] * 2}
    assert measure(Metric("nDCG", 10), ranks[4], judged).tolist() == [0, 0]


def test_without_thread_control_one_thread_gives_the_same(monkeypatch):
    rng = np.random.default_rng(3)
    q, d = signs(rng, 9, 8), signs(rng, 30, 8)
    judged = judgements(rng, 9, 30, 2)
    expected = ranks_at_widths(q, d, judged, [8], chunk=2)[8]
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    np.testing.assert_array_equal(ranks_at_widths(q, d, judged, [8], chunk=2)[8], expected)


def test_bad_input():
    rng = np.random.default_rng(4)
    q, d = signs(rng, 3, 8), signs(rng, 5, 8)
    judged = judgements(rng, 3, 5, 1)
    with pytest.raises(InputError, match="3 judged queries but 2"):
        ranks_at_widths(q[:2], d, judged, [8])
    with pytest.raises(InputError, match="8 dimensions and documents 4"):
        ranks_at_widths(q, d[:, :4], judged, [4])
    with pytest.raises(InputError, match="8 dimensions and documents 4"):
        list(prefix_scores(q, d[:, :4], [4]))
    with pytest.raises(InputError, match=r"outside 1\.\.8"):
        ranks_at_widths(q, d, judged, [9])
    with pytest.raises(InputError, match="rise strictly"):
        check_widths([4, 4], 8)
    with pytest.raises(InputError, match="rise strictly"):
        check_widths([], 8)
    with pytest.raises(InputError, match="chunk must be"):
        ranks_at_widths(q, d, judged, [8], chunk=0)
    with pytest.raises(InputError, match="judgements name document"):
        ranks_at_widths(q, d[:1], Judgements(np.arange(3), np.array([0, 0, 1]), np.ones(3), 3), [8])
    with pytest.raises(InputError, match="floating point"):
        ranks_at_widths(q.astype(int), d, judged, [8])
    for name, at in (("queries", 0), ("documents", 1)):
        both = [q.copy(), d.copy()]
        both[at][2, 7] = np.inf
        with pytest.raises(InputError, match=f"{name}: row 2 holds NaN or Inf"):
            ranks_at_widths(*both, judged, [4, 8])
