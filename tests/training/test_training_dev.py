"""What the dev set says while training."""

import json

import numpy as np

import matryo as mt
from matryo.core.prefix import Nesting
from matryo.encoders.toy import ToyEncoder
from matryo.training.card import score_rows
from matryo.training.dev import DevEvaluator, read_dev


def test_blank_documents_of_a_dev_set_are_never_encoded_and_never_found(dev_folder, tmp_path):
    rows = [json.loads(line) for line in (dev_folder / "corpus.jsonl").read_text().splitlines()]
    rows[3]["text"] = rows[100]["text"] = " "
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels").mkdir()
    for name in ("queries.jsonl", "qrels/dev.tsv"):
        (tmp_path / name).write_text((dev_folder / name).read_text())
    asked = []

    def encode(texts):
        asked.append(len(texts))
        return ToyEncoder().vectors(texts)

    evaluator = DevEvaluator(read_dev(tmp_path, "dev"), Nesting([8, 64]), "recall@200", lambda _: encode)
    # Every document is within the cut but the blank one.
    assert evaluator(None) == {"width_8": 59 / 60, "width_64": 59 / 60, "mean": 59 / 60}
    assert asked == [60, 118]
    found = {(row["width"], row["code"]): row["value"] for row in score_rows(evaluator, encode, Nesting([8, 64]))}
    assert found == dict.fromkeys(found, round(59 / 60, 5))
    assert len(found) == 6

    evaluator = DevEvaluator(read_dev(tmp_path, "dev"), Nesting([8, 64]), "nDCG@10", lambda _: encode)
    report = mt.evaluate(mt.load("toy"), tmp_path, split="dev", widths=[8], baselines=(), resamples=10)
    expected = {row.width: row.value for row in report.select()}
    np.testing.assert_allclose([evaluator.scores(encode)[w] for w in (8, 64)], [expected[w] for w in (8, 64)])
