import gzip
import json

import numpy as np
import pytest

import matryo as mt
from matryo.classify import LinearHeads, fit_heads
from matryo.cli import run
from matryo.core.errors import InputError
from matryo.core.prefix import truncate
from matryo.evaluation import LabelledTask, combine
from matryo.evaluation.labelled import nearest


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((6, 16))
    labels = np.repeat(np.arange(6), 20)
    items = (centres[labels] + 1.5 * rng.standard_normal((120, 16))).astype(np.float32)
    order = rng.permutation(120)
    return items[order[:80]], items[order[80:]], labels[order[:80]], labels[order[80:]]


@pytest.fixture(scope="module")
def task(vectors):
    _, _, train, test = vectors
    return LabelledTask("six", train, test, coarse={str(n): "even" if n % 2 == 0 else "odd" for n in range(6)})


@pytest.fixture(scope="module")
def report(vectors, task):
    return mt.evaluate(
        vectors[:2], task, [4, 8], codes=["int8", "binary"], baselines=["pca", "svd", "random", "select"], resamples=50,
        heads=fit_heads(vectors[0], vectors[2], [4, 16]),
    )  # fmt: skip


def one(report, metric, width, code="float32", model=None):
    (row,) = [r for r in report.select(metric, model or report.model, code) if r.width == width]
    return row.value


@pytest.mark.parametrize("width", [4, 8, 16])
def test_neighbours_are_those_of_a_plain_loop(vectors, report, width):
    train, test, known, wanted = vectors
    first, average, precision, recall = [], [], [], []
    for vector, label in zip(truncate(test, width), wanted, strict=True):
        order = np.argsort(-(truncate(train, width) @ vector), kind="stable")[:10]
        hits = [known[n] == label for n in order]
        relevant = int((known == label).sum())
        first.append(hits[0])
        average.append(sum(sum(hits[: n + 1]) / (n + 1) for n in range(10) if hits[n]) / min(10, relevant))
        precision.append(sum(hits) / 10)
        recall.append(sum(hits) / relevant)
    assert one(report, "1-NN", width) == pytest.approx(np.mean(first))
    assert one(report, "mAP@10", width) == pytest.approx(np.mean(average))
    assert one(report, "P@10", width) == pytest.approx(np.mean(precision))
    assert one(report, "R@10", width) == pytest.approx(np.mean(recall))


def test_the_probe_is_scikit_learns_on_the_prefix(vectors, report):
    from sklearn.linear_model import LogisticRegression

    train, test, known, wanted = vectors
    for width in (4, 8, 16):
        probe = LogisticRegression(C=10, max_iter=10_000, tol=1e-9).fit(truncate(train, width), known)
        assert one(report, "top-1", width) == pytest.approx(probe.score(truncate(test, width), wanted))
        heads = fit_heads(train, known, [width])
        np.testing.assert_allclose(heads.weights[0], probe.coef_, atol=1e-3)
    assert one(report, "top-5", 8) >= one(report, "top-1", 8)
    assert one(report, "coarse top-1", 8) >= one(report, "top-1", 8)


def test_heads_given_are_measured_at_their_widths_alone(report):
    assert {r.width for r in report.select("head top-1")} == {4, 16}
    assert one(report, "head top-1", 4) == one(report, "top-1", 4)


def test_codes_have_neighbours_and_no_probe(report):
    assert not report.select("top-1", code="int8")
    assert one(report, "1-NN", 16, "int8") == pytest.approx(one(report, "1-NN", 16), abs=0.06)
    assert report.select("mAP@10", code="binary")


def test_svd_and_pca_and_projections_keep_full_width(report):
    assert one(report, "1-NN", 16, model="SVD") == one(report, "1-NN", 16)
    assert one(report, "1-NN", 16, model="random features") == one(report, "1-NN", 16)
    assert set(report.models) == {"vectors", "PCA", "SVD", "random projection", "random features"}


def test_ties_go_to_the_lower_row():
    train = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    assert dict(nearest(train[:1], train, [1, 2], 2))[2].tolist() == [[0, 1]]
    assert dict(nearest(train[:1], train, [1], 3))[1].tolist() == [[0, 1, 2]]


def test_baselines_know_nothing_of_test(vectors, task):
    train, test, *_ = vectors
    whole = mt.evaluate((train, test), task, [4], baselines=["pca", "svd"], resamples=2)
    moved = mt.evaluate(
        (train, test[::-1].copy()), LabelledTask("six", task.train_labels, task.test_labels[::-1]), [4],
        baselines=["pca", "svd"], resamples=2,
    )  # fmt: skip
    for model in ("PCA", "SVD"):
        assert one(whole, "1-NN", 4, model=model) == one(moved, "1-NN", 4, model=model)


def test_twins_and_separate_models_stand_beside_the_first(vectors, task):
    train, test, *_ = vectors
    found = mt.evaluate(
        (train, test), task, [4], baselines=[], resamples=2, twins={"twin": (train, test)},
        separate={4: (train[:, :4], test[:, :4])},
    )  # fmt: skip
    assert one(found, "top-1", 4, model="twin") == one(found, "top-1", 4)
    assert one(found, "1-NN", 4, model="trained at one width") == one(found, "1-NN", 4)


def test_runs_combine_to_mean_and_spread(vectors, task, report):
    other = mt.evaluate(vectors[:2], task, [4], baselines=["random"], resamples=2, seed=1)
    same = mt.evaluate(vectors[:2], task, [4], baselines=["random"], resamples=2, seed=2)
    rows = {(s.model, s.width, s.metric): s for s in combine([other, same])}
    assert rows["vectors", 4, "1-NN"].deviation == 0
    spread = rows["random projection", 4, "1-NN"]
    assert spread.mean == pytest.approx(np.mean(spread.values))
    assert spread.deviation == pytest.approx(np.std(spread.values, ddof=1))
    with pytest.raises(InputError, match="not in every report"):
        combine([report, other])


def test_the_report_is_saved_in_every_kind(report, tmp_path):
    assert "80 train items" in report.table()
    assert json.loads(report.save(tmp_path / "r.json").read_text())["kind"] == "labelled"
    assert "mAP@10" in report.save(tmp_path / "r.html").read_text()


def test_two_classes_have_two_rows_of_weights(vectors):
    train, _, known, _ = vectors
    heads = fit_heads(train, known % 2, [16])
    assert heads.weights[0].shape == (2, 16)
    assert (heads.logits(train, 0).argmax(1) == known % 2).mean() > 0.7


def test_a_head_that_has_not_converged_is_told(vectors, caplog):
    fit_heads(vectors[0], vectors[2], [16], iterations=2)
    assert "width 16 has not converged in 2 steps" in caplog.text


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (["a", "a"], ["a"], "one class 'a'"),
        (["a", "b"], ["a"], "every class has one item"),
        (["a", "a", "b"], ["c"], "missing in train"),
        (["a", "a", "b"], [], "test labels: there are none"),
        (["a", "a", float("nan")], ["a"], "must be text or a whole number"),
        (["a", "a", ""], ["a"], "must be text or a whole number"),
    ],
)
def test_labels_that_cannot_be_measured_are_refused(train, test, said):
    with pytest.raises(InputError, match=said):
        LabelledTask("bad", train, test)


def test_vectors_that_do_not_fit_are_refused(vectors, task):
    train, test, *_ = vectors
    spoilt = train.copy()
    spoilt[3, 2] = np.nan
    with pytest.raises(InputError, match="row 3 holds NaN"):
        mt.evaluate((spoilt, test), task)
    with pytest.raises(InputError, match="79 train vectors but 80 labels"):
        mt.evaluate((train[:-1], test), task)
    with pytest.raises(InputError, match="no items to encode"):
        mt.evaluate(mt.load("toy"), task)
    with pytest.raises(InputError, match="unknown baseline"):
        mt.evaluate((train, test), task, baselines=["magic"])
    with pytest.raises(InputError, match="NaN or Inf"):
        LinearHeads((2,), ("a", "b"), (np.full((2, 2), np.nan, np.float32),), (np.zeros(2, np.float32),))


def test_the_command_line_takes_a_folder_of_two_files(tmp_path, capsys):
    for split, count in (("train", 12), ("test", 6)):
        lines = [{"text": f"the {['dog', 'cat'][n % 2]} number {n}", "label": "xy"[n % 2]} for n in range(count)]
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
    assert run(["eval", "toy", str(tmp_path), "--baselines", "svd,select", "--codes", "int8", "--resamples", "20"]) == 0
    assert "top-1" in capsys.readouterr().out
    (tmp_path / "test.jsonl.gz").unlink()
    assert run(["eval", "toy", str(tmp_path)]) == 2
    assert "no test file" in capsys.readouterr().err


def test_heads_of_a_model_folder_come_over_as_they_are():
    import torch

    from matryo.core.prefix import Nesting
    from matryo.losses import NestedHead

    x = torch.randn(5, 8)
    for tied, normalize in ((False, False), (True, True)):
        head = NestedHead(Nesting([2, 8]), 3, tied, normalize)
        mine = LinearHeads.of(head, ["a", "b", "c"])
        for level, width in enumerate((2, 8)):
            wanted = torch.nn.functional.linear(*head.parts(x, width)).detach().numpy()
            np.testing.assert_allclose(mine.logits(x.numpy(), level), wanted, atol=1e-5)
