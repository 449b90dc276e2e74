"""Mining by eye: what each width confuses, who owns what, what the file says. The twin is in tests/twins."""

import json

import pyarrow.parquet
import pytest

from matryo.core.records import read_pairs
from matryo.mining import Mining, mine, table

# Two dimensions of subject and two of detail. "cat" and "car" begin alike; "cat" and "lion" end alike.
VECTORS = {
    "cat?": [1.0, 0.0, 0.0, 2.0],
    "cat": [1.0, 0.1, 0.0, 2.0],
    "car": [1.0, 0.2, 3.0, 0.0],
    "lion": [0.0, 1.0, 0.0, 2.0],
    "boat?": [0.0, -1.0, -3.0, 0.0],
    "boat": [0.0, -1.0, -3.0, 0.1],
}
ROWS = [("cat?", "cat"), ("boat?", "boat")]


def texts_of(path):
    read = read_pairs(path)
    return list(zip(read.anchors, read.positives, *read.negatives, strict=True))


def metadata(path):
    return json.loads(pyarrow.parquet.read_schema(path).metadata[b"matryo"])


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("car", "lion", "cat")))
    return path


def test_a_short_prefix_confuses_other_things_than_the_full_width(model, pairs, corpus, tmp_path):
    file, out = pairs(*ROWS), tmp_path / "hard.parquet"
    found = mine(model(VECTORS), file, out, Mining(widths=(2,), margin=0), corpus)
    assert texts_of(out)[0] == ("cat?", "cat", "car")
    mine(model(VECTORS), file, out, Mining(widths=(4,), margin=0), corpus)
    assert texts_of(out)[0] == ("cat?", "cat", "lion")
    found = mine(model(VECTORS), file, out, Mining(widths=(2, 4), margin=0), corpus)
    assert texts_of(out) == [("cat?", "cat", "car", "lion"), ("boat?", "boat", "cat", "lion")]
    assert metadata(out)["columns"] == {"negative": 2, "negative_2": 4}
    assert (found.rows, found.pairs, found.anchors, found.candidates) == (2, 2, 2, 4)
    assert [(at.width, at.columns) for at in found.widths] == [(2, ("negative",)), (4, ("negative_2",))]


def test_each_text_is_encoded_once_whatever_the_widths(model, pairs, corpus, tmp_path):
    made = model(VECTORS)
    mine(made, pairs(*ROWS, ROWS[0]), tmp_path / "hard.parquet", Mining(widths=(2, 3, 4), margin=0), corpus)
    assert made.encoder.asked == ["cat?", "boat?", "cat", "boat", "car", "lion"]


def test_the_margin_is_of_the_width_and_is_counted(model, pairs, tmp_path):
    rows = [("a", "p"), ("b", "q"), ("c", "r")]
    vectors = {key: [0.0, 1.0] for key in "bc"} | {"a": [1.0, 0.0], "p": [0.8, 0.6], "q": [0.96, 0.28], "r": [0.6, 0.8]}
    file, out = pairs(*rows), tmp_path / "hard.parquet"
    found = mine(model(vectors), file, out, Mining(margin=0))
    assert texts_of(out) == [("a", "p", "r"), ("c", "r", "p")]  # b's positive is its farthest text
    assert found.widths[0].false_negatives == 1 + 2
    assert (found.rows, found.widths[0].short) == (2, 1)
    found = mine(model(vectors), file, out, Mining(margin=0.19))
    assert texts_of(out) == [("a", "p", "r"), ("c", "r", "p")]
    found = mine(model(vectors), file, out, Mining(margin=0.21))
    assert texts_of(out) == [("c", "r", "q")]  # .6 is within .21 of .8
    assert found.widths[0].false_negatives == 2 + 2 + 1
    found = mine(model(vectors), file, out, Mining(relative_margin=0.74))
    assert texts_of(out) == [("c", "r", "q")]


def test_every_row_of_an_anchor_counts(model, pairs, tmp_path):
    """Positives of its other rows are no negatives, and the lowest of them sets the limit."""
    vectors = {"a": [1.0, 0.0], "p": [0.8, 0.6], "q": [0.96, 0.28], "b": [0.0, 1.0], "r": [0.6, 0.8], "s": [0.28, 0.96]}
    out = tmp_path / "hard.parquet"
    mine(model(vectors), pairs(("a", "q"), ("a", "p"), ("b", "s"), ("b", "r")), out, Mining(margin=0.21))
    assert texts_of(out)[:2] == [("a", "q", "s"), ("a", "p", "s")]


def test_groups_and_pairs_read_backwards_are_own(model, pairs, tmp_path):
    vectors = {name: [1.0, 0.1 * n] for n, name in enumerate("abcdef")}
    rows = [("a", "b", "x"), ("c", "d", "x"), ("e", "f", "y")]
    out = tmp_path / "hard.parquet"
    mine(model(vectors), pairs(*rows), out, Mining(margin=0))
    read = read_pairs(out)
    got = list(zip(read.anchors, read.negatives[0], read.groups, strict=True))
    assert got == [("a", "f", "x"), ("c", "f", "x"), ("e", "d", "y")]
    # "b" is an anchor whose positive is "a": it is never a negative of "a", though no row says ("a", "b").
    mine(model(vectors), pairs(("a", "c"), ("b", "a"), ("d", "b"), ("e", "f")), out, Mining(margin=0))
    assert texts_of(out)[0] == ("a", "c", "f")


def test_ranks_skip_the_nearest(model, pairs, tmp_path):
    rows = [(f"a{n}", f"p{n}") for n in range(9)]
    vectors = {"a0": [1.0, 0.0], "p0": [1.0, 0.0]} | {f"p{n}": [1.0, 0.1 * n] for n in range(1, 9)}
    vectors |= {f"a{n}": vectors[f"p{n}"] for n in range(1, 9)}
    out = tmp_path / "hard.parquet"
    mine(model(vectors), pairs(*rows), out, Mining(negatives=2, ranks=(3, 5), margin=0))
    assert texts_of(out)[0] == ("a0", "p0", "p3", "p4")
    drawn = set()
    for seed in range(8):
        options = Mining(negatives=2, ranks=(3, 5), margin=0, sample=True, seed=seed)
        mine(model(vectors), pairs(*rows), out, options)
        first = texts_of(out)
        mine(model(vectors), pairs(*rows), out, options)
        assert texts_of(out) == first
        drawn.add(first[0][2:])
    assert drawn == {("p3", "p4"), ("p3", "p5"), ("p4", "p5")}


def test_streamed_in_row_groups(pairs_file, tmp_path, monkeypatch):
    import matryo as mt

    whole, out = tmp_path / "whole.parquet", tmp_path / "hard.parquet"
    mine(mt.load("toy"), pairs_file, whole)
    monkeypatch.setattr(table, "ROW_GROUP", 7)
    found = mine(mt.load("toy"), pairs_file, out)
    sizes = [pyarrow.parquet.ParquetFile(out).metadata.row_group(n).num_rows for n in range(-(-found.rows // 7))]
    assert sum(sizes) == found.rows
    assert set(sizes[:-1]) == {7}
    assert texts_of(out) == texts_of(whole)


def test_the_file_says_how_it_was_made(pairs_file, trained, tmp_path):
    import matryo as mt

    out = tmp_path / "hard.parquet"
    mine(mt.load(trained), pairs_file, out, Mining(widths=(8, 32), seed=5))
    said = metadata(out)
    assert said["model"]["name"] == str(trained)
    assert len(said["model"]["blake2b"]) == len(said["pairs"]["blake2b"]) == 32
    assert (said["widths"], said["margin"], said["relative_margin"], said["seed"]) == ([8, 32], None, 0.95, 5)
    assert said["pairs"]["rows"] == 200
    assert {"matryo", "python", "numpy", "faiss-cpu", "pyarrow"} <= set(said["versions"])


def test_progress_reaches_every_total(pairs_file, tmp_path):
    import matryo as mt

    told = {}
    mine(
        mt.load("toy"),
        pairs_file,
        tmp_path / "hard.parquet",
        Mining(widths=(8, 64)),
        report=lambda what, done, total: told.update({what: (done, total)}),
    )
    assert list(told) == ["encoding anchors", "encoding candidates", "mining width 8", "mining width 64", "writing"]
    assert all(done == total > 0 for done, total in told.values())
