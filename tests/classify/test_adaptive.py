import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import log_loss

import matryo as mt
from matryo.classify import AdaptiveClassifier, LinearHeads, fit_heads
from matryo.classify.heads import STRENGTHS
from matryo.classify.page import save_page
from matryo.classify.thresholds import frontier, levels_of, paid
from matryo.cli import run
from matryo.core.errors import DamagedError, InputError

WIDTHS = [2, 4, 16]


def items(seed, count):
    centres = np.random.default_rng(0).standard_normal((4, 16)) * np.geomspace(4, 1, 16)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    return (centres[labels] + rng.standard_normal((count, 16))).astype(np.float32), labels


TRAIN, CALIBRATION, TEST = items(1, 200), items(2, 400), items(3, 300)
HEADS = fit_heads(*TRAIN, WIDTHS)
threshold = st.floats(0, 1.5) | st.just(float("inf"))


@given(st.lists(threshold, min_size=2, max_size=2), st.sampled_from(["softmax", "margin"]))
@settings(max_examples=25, deadline=None)
def test_a_batch_is_its_items_one_by_one_and_a_plain_loop(thresholds, confidence):
    made = AdaptiveClassifier(HEADS, thresholds, confidence)
    vectors = TEST[0][:20]
    whole = made.predict(vectors)
    for n in range(20):
        alone = made.predict(vectors[n : n + 1])
        assert (alone.labels[0], alone.widths[0], alone.read[0]) == (whole.labels[n], whole.widths[n], whole.read[n])
        read = 0
        for level, width in enumerate(WIDTHS):
            if level < 2 and thresholds[level] == float("inf"):
                continue
            read += width
            logits = HEADS.logits(vectors[n : n + 1], level)[0].astype(float)
            shares = np.sort(np.exp(logits) / np.exp(logits).sum())
            sure = shares[-1] - (shares[-2] if confidence == "margin" else 0)
            if level == 2 or sure >= thresholds[level]:
                break
        assert (width, read) == (whole.widths[n], whole.read[n])


def test_zero_stops_all_at_once_and_above_one_is_the_full_head():
    first = AdaptiveClassifier(HEADS, [0, 0]).predict(TEST[0])
    assert set(first.widths) == {2} == set(first.read)
    full = [HEADS.classes[n] for n in HEADS.logits(TEST[0], 2).argmax(1)]
    beyond = AdaptiveClassifier(HEADS, [1.01, 1.01]).predict(TEST[0])
    assert beyond.labels == full
    assert set(beyond.widths) == {16}
    assert set(beyond.read) == {22}
    skipped = AdaptiveClassifier(HEADS, [np.inf, np.inf]).predict(TEST[0])
    assert skipped.labels == full
    assert set(skipped.read) == {16}


@given(st.lists(st.floats(0, 1.2), min_size=2, max_size=2), st.lists(st.floats(0, 0.5), min_size=2, max_size=2))
@settings(max_examples=25, deadline=None)
def test_higher_finite_thresholds_never_cost_less(low, more):
    high = [a + b for a, b in zip(low, more, strict=True)]
    assert (
        AdaptiveClassifier(HEADS, low).predict(TEST[0]).read <= AdaptiveClassifier(HEADS, high).predict(TEST[0]).read
    ).all()


def test_the_frontier_holds_the_best_single_threshold():
    rng = np.random.default_rng(5)
    confidences = rng.random((40, 2))
    right = np.stack([rng.random(40) < confidences[:, 0], np.ones(40, bool)], axis=1)
    widths = np.array([1, 16])
    found = frontier(confidences, right, widths)

    def point(t):
        levels = levels_of(confidences, t)
        return paid(widths, t)[levels].mean(), right[np.arange(40), levels].mean()

    tried = [point(np.array([t])) for t in [*confidences[:, 0], np.inf]]
    for cost, accuracy in map(point, found):
        assert not any(c <= cost and a > accuracy + 1e-12 for c, a in tried)


def tied(normalize):
    """MRL-E heads: every one a prefix of the widest."""
    weight, bias = HEADS.weights[-1], HEADS.biases[-1]
    each = tuple(np.ascontiguousarray(weight[:, :width]) for width in WIDTHS)
    return LinearHeads(tuple(WIDTHS), HEADS.classes, each, (bias,) * 3, normalize)


@pytest.mark.parametrize("normalize", [True, False])
@given(thresholds=st.lists(threshold, min_size=2, max_size=2))
@settings(max_examples=15, deadline=None)
def test_tied_heads_go_on_from_each_others_sums(normalize, thresholds):
    heads = tied(normalize)
    assert heads.tied
    assert not HEADS.tied
    blank = np.repeat(np.float32([[0, 1]]), [2, 14], axis=1)  # its narrowest prefix is all zeros
    vectors = np.concatenate([TEST[0][:30], blank])
    found = AdaptiveClassifier(heads, thresholds).predict(vectors)
    assert found.read.tolist() == found.widths.tolist(), "each dimension is read once"
    apart = tied(normalize)
    vars(apart)["tied"] = False  # as if they had nothing to do with each other
    slow = AdaptiveClassifier(apart, thresholds).predict(vectors)
    assert (found.labels, found.widths.tolist()) == (slow.labels, slow.widths.tolist())
    sums = np.zeros((31, 4), np.float32)
    for level, before in ((0, 0), (1, 2), (2, 4)):
        later = heads.logits_after(vectors, level, sums, before)
        np.testing.assert_allclose(later, heads.logits(vectors, level), rtol=1e-4, atol=1e-5)


def test_the_frontier_of_tied_heads_holds_the_best_pair_of_thresholds():
    """Brute force over both thresholds, with the cost of the last head alone."""
    rng = np.random.default_rng(6)
    confidences = rng.random((25, 3))
    right = rng.random((25, 3)) < np.array([0.5, 0.7, 0.95])
    widths = np.array([1, 4, 16])

    def point(t):
        levels = levels_of(confidences, np.array(t))
        return widths[levels].mean(), right[np.arange(25), levels].mean()

    every = [[*confidences[:, level], np.inf] for level in (0, 1)]
    tried = [point((a, b)) for a in every[0] for b in every[1]]
    found = [point(t) for t in frontier(confidences, right, widths, tied=True)]
    for price in (2, 8, 20, 60):
        best = min(cost + price * (1 - accuracy) for cost, accuracy in tried)
        assert min(cost + price * (1 - accuracy) for cost, accuracy in found) <= best * 1.05
    assert paid(widths, np.array([0.5, 0.5]), tied=True).tolist() == [1, 4, 16]


def test_the_cascade_keeps_the_target_at_less_cost():
    made = mt.AdaptiveClassifier.fit(*TRAIN, CALIBRATION, widths=WIDTHS, target=0.9)
    seen = made.measure(*CALIBRATION)
    assert seen.accuracy >= 0.9
    assert seen.expected_width < 16
    assert seen.last_width <= seen.expected_width
    assert seen.multiply_adds == pytest.approx(4 * seen.expected_width)
    new, predicted = made.measure(*TEST), made.predict(TEST[0])
    assert new.accuracy == pytest.approx(np.mean(np.array(predicted.labels) == TEST[1].astype(str)))
    assert new.expected_width == pytest.approx(predicted.read.mean())
    assert len(made.curve(*TEST)) == len(made.ladder) > 3


def test_a_promise_is_dearer_and_needs_evidence():
    plain = AdaptiveClassifier.fit(*TRAIN, CALIBRATION, widths=WIDTHS, target=0.85)
    sure = AdaptiveClassifier.fit(*TRAIN, CALIBRATION, widths=WIDTHS, target=0.85, promised=0.95)
    assert sure.measure(*TEST).accuracy >= 0.85
    assert plain.measure(*TEST).expected_width <= sure.measure(*TEST).expected_width
    with pytest.raises(InputError, match=r"cannot be kept at confidence 0\.95"):
        AdaptiveClassifier.fit(*TRAIN, CALIBRATION, widths=WIDTHS, target=0.9999, promised=0.95)


def test_a_promise_does_not_depend_on_rows_sorted_by_class():
    vectors, labels = CALIBRATION
    order = np.argsort(labels, kind="stable")
    sure = AdaptiveClassifier.fit(*TRAIN, (vectors[order], labels[order]), widths=WIDTHS, target=0.85, promised=0.95)
    tested = np.random.default_rng(0).permutation(len(order))[len(order) // 2 :]
    assert set(labels[order][tested]) == {0, 1, 2, 3}
    assert set(labels[order][len(order) // 2 :]) != {0, 1, 2, 3}, "as they lie, the second half lacks a class"
    assert sure.measure(*TEST).accuracy >= 0.85


def test_saved_and_loaded_bit_for_bit(tmp_path):
    made = AdaptiveClassifier.fit(*TRAIN, CALIBRATION, widths=WIDTHS, confidence="margin", target=0.9)
    back = AdaptiveClassifier.load(made.save(tmp_path / "model"))
    assert back.confidence == "margin"
    assert back.heads.classes == made.heads.classes
    assert back.thresholds.tobytes() == made.thresholds.tobytes()
    assert [t.tobytes() for t in back.ladder] == [t.tobytes() for t in made.ladder]
    for a, b in zip(back.heads.weights + back.heads.biases, made.heads.weights + made.heads.biases, strict=True):
        assert a.tobytes() == b.tobytes()
    (tmp_path / "model/classifier.safetensors").write_bytes(b"no")
    with pytest.raises(DamagedError, match="cannot be read"):
        AdaptiveClassifier.load(tmp_path / "model")


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no classifier"):
        AdaptiveClassifier.load(tmp_path)
    with pytest.raises(InputError, match="3 widths need 2 thresholds"):
        AdaptiveClassifier(HEADS, [0.5])
    with pytest.raises(InputError, match="unknown confidence"):
        AdaptiveClassifier(HEADS, [0.5, 0.5], "hope")
    with pytest.raises(InputError, match="the heads read 16"):
        AdaptiveClassifier(HEADS, [0.5, 0.5]).predict(TEST[0][:, :8])
    with pytest.raises(InputError, match="400 vectors but 399 labels"):
        AdaptiveClassifier.fit(*TRAIN, (CALIBRATION[0], CALIBRATION[1][:-1]))


def test_texts_go_through_a_model():
    model = mt.load("toy")
    texts, labels = ["a dog barks", "a cat purrs"] * 10, ["dog", "cat"] * 10
    vectors = model.encode(texts)
    made = AdaptiveClassifier.fit(vectors, labels, (vectors, labels), widths=[8, model.width], target=0.9)
    assert made.predict_texts(model, texts[:2]).labels == ["dog", "cat"]


def test_heads_that_do_not_normalise_read_raw_lengths():
    class Lengths:
        """Texts of n letters as (n, 1); a model's `encode` would make the length one."""

        def features(self, texts):
            return np.array([[len(text), 1] for text in texts], dtype=np.float32)

        def encode(self, texts):
            raise AssertionError("unit vectors are not what these heads were trained on")

    weight, bias = np.array([[-1, 0], [1, 0]], dtype=np.float32), np.array([5, -5], dtype=np.float32)
    heads = LinearHeads((2,), ("short", "long"), (weight,), (bias,), normalize=False)
    assert AdaptiveClassifier(heads, []).predict_texts(Lengths(), ["ab", "abcdefgh"]).labels == ["short", "long"]


def test_heads_are_held_back_as_asked(tmp_path, capsys):
    loose = AdaptiveClassifier.fit(*TRAIN, CALIBRATION, widths=WIDTHS, target=0.5, strength=1000)
    wanted = fit_heads(*TRAIN, WIDTHS, strength=1000)
    for mine, theirs, tight in zip(loose.heads.weights, wanted.weights, HEADS.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert np.linalg.norm(mine) > np.linalg.norm(tight)
    with pytest.raises(InputError, match="strength must be above 0, got -1"):
        AdaptiveClassifier.fit(*TRAIN, CALIBRATION, strength=-1)
    rows = [{"text": f"a {what} {n}", "label": what} for n in range(12) for what in ("dog", "cat")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["classify", "fit", "toy", *[str(tmp_path / "rows.jsonl")] * 2, "--out", str(tmp_path / "out")]
    sizes = []
    for strength in ("1", "1000"):
        assert run([*words, "--strength", strength]) == 0
        sizes.append(np.linalg.norm(AdaptiveClassifier.load(tmp_path / "out").heads.weights[-1]))
    assert sizes[0] < sizes[1]
    assert run([*words, "--strength", "auto"]) == 0
    for wrong in ("0", "nan", "much"):
        assert run([*words, "--strength", wrong]) == 2
        assert "above 0" in capsys.readouterr().err


def test_an_accuracy_of_one_may_be_asked_for_and_not_promised():
    sure = np.repeat(np.eye(2, dtype=np.float32), 20, axis=0), [0] * 20 + [1] * 20
    assert AdaptiveClassifier.fit(*sure, sure, target=1.0).measure(*sure).accuracy == 1
    for wrong in ({"target": 1.0, "promised": 0.9}, {"target": 1.1}, {"target": float("nan")}, {"target": 0}):
        with pytest.raises(InputError, match="target is an accuracy between 0 and 1"):
            AdaptiveClassifier.fit(*sure, sure, **wrong)


def test_a_strength_of_each_width_chosen_on_held_out_rows():
    """Slow twin: every strength is tried, and log losses are scikit-learn's."""
    vectors, labels = TRAIN[0], np.array(TRAIN[1])
    rest, part = np.split(np.random.default_rng(0).permutation(len(labels)), [len(labels) // 5])
    made = fit_heads(*TRAIN, WIDTHS, strength=None)
    for level, width in enumerate(WIDTHS):
        losses = {}
        for strength in STRENGTHS:
            heads = fit_heads(vectors[part], labels[part], [width], strength)
            chances = softmax(heads.logits(vectors[rest], 0), axis=1)
            losses[strength] = log_loss(labels[rest].astype(str), chances, labels=heads.classes)
        best = min(losses, key=losses.get)
        np.testing.assert_allclose(made.weights[level], fit_heads(*TRAIN, [width], best).weights[0], atol=1e-6)


def test_a_strength_is_chosen_where_held_out_rows_have_no_class_in_common():
    vectors, labels = np.eye(10, dtype=np.float32), list("abcdefghij")
    made, plain = (fit_heads(vectors, labels, [10], **how) for how in ({"strength": None}, {}))
    np.testing.assert_array_equal(made.weights[0], plain.weights[0])


def test_the_command_line_fits_and_predicts(tmp_path, capsys):
    rows = [{"text": f"a {what} {n}", "label": what} for n in range(12) for what in ("dog", "cat")]
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, val, out = (str(tmp_path / name) for name in ("train.jsonl", "val.jsonl", "out"))
    assert run(["classify", "fit", "toy", train, val, "--out", out, "--target", "0.9"]) == 0
    assert "dimensions read a text" in capsys.readouterr().out
    assert run(["classify", "predict", "toy", out, val]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert np.mean([a["label"] == b["label"] for a, b in zip(found, rows, strict=True)]) >= 0.9
    assert run(["classify", "predict", "toy", str(tmp_path), val]) == 2
    assert "holds no classifier" in capsys.readouterr().err
    page = tmp_path / "cascade.html"
    assert run(["classify", "measure", "toy", out, val, "--report", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] >= 0.9
    assert told["full"]["expected_width"] == mt.load("toy").width
    assert f"{told['expected_width']:.1f} dimensions" in page.read_text()
    assert run(["classify", "measure", "toy", out, val]) == 0
    assert f"accuracy {told['accuracy']:.4f} at" in capsys.readouterr().out
    assert run(["classify", "measure", "toy", out, val, "--report", "cascade.pdf"]) == 2
    assert "must end in .html" in capsys.readouterr().err


def test_heads_alone_are_what_a_cascade_has_to_beat():
    found = AdaptiveClassifier(HEADS, [0.5, 0.5]).alone(*TEST)
    for level, (width, one) in enumerate(zip(WIDTHS, found, strict=True)):
        right = np.array(HEADS.classes)[HEADS.logits(TEST[0], level).argmax(1)] == TEST[1].astype(str)
        assert (one.accuracy, one.expected_width, one.last_width) == (pytest.approx(right.mean()), width, width)


@pytest.mark.parametrize("heads", [HEADS, tied(True)], ids=["apart", "tied"])
def test_the_page_holds_every_number_and_nothing_from_elsewhere(heads, tmp_path):
    made = AdaptiveClassifier.fit(*TRAIN, CALIBRATION, heads=heads, target=0.6)
    chosen, curve, alone = made.measure(*TEST), made.curve(*TEST), made.alone(*TEST)
    text = save_page(tmp_path / "cascade.html", made, chosen, curve, alone, 300).read_text()
    for one in curve:
        assert f"<td>{one.expected_width:.1f}</td><td>{one.accuracy:.4f}</td>" in text
    assert ("tied" in text) == heads.tied
    assert not re.search(r"(?:src|href)=\"(?!#)", text)
    assert "<script" not in text
