import gzip
import json

import numpy as np
import pytest

from matryo.core.errors import InputError
from matryo.core.records import (
    check_texts,
    check_vectors,
    read_labelled,
    read_pairs,
    read_retrieval,
    read_sts,
    read_texts,
    read_vectors,
    rows,
)


def jsonl(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def beir(tmp_path):
    """A set of three queries, one of them judged only as not relevant."""
    jsonl(
        tmp_path / "corpus.jsonl",
        {"_id": "a", "title": "Title", "text": "body"},
        {"_id": "b", "title": "", "text": "text alone"},
        {"_id": "c", "title": "title alone", "text": ""},
    )
    jsonl(tmp_path / "queries.jsonl", *({"_id": f"q{n}", "text": f"question {n}"} for n in range(3)))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\ta\t1\nq0\tc\t2\nq0\ta\t1\nq1\ta\t0\n")
    return tmp_path


def test_retrieval_keeps_judged_queries_and_joins_title_and_text(beir):
    got = read_retrieval(beir)
    assert got.documents == ["Title body", "text alone", "title alone"]
    assert got.query_ids == ["q0", "q2"]
    assert got.judged.queries.tolist() == [0, 0, 1]
    assert got.judged.documents.tolist() == [0, 2, 0]
    assert got.judged.grades.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("q0\tzzz\t1", "line 6: document 'zzz'"),
        ("zzz\ta\t1", "line 6: query 'zzz'"),
        ("q0\ta\tmany", "line 6: score must be a number, got 'many'"),
        ("q0\ta", "line 6: expected 3 columns"),
    ],
)
def test_a_bad_judgement_is_named_by_file_and_line(beir, line, said):
    with (beir / "qrels/test.tsv").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(InputError, match=rf"test\.tsv {said}"):
        read_retrieval(beir)


def test_a_corpus_without_judged_queries_is_refused(beir):
    (beir / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\t0\n")
    with pytest.raises(InputError, match="no query has a relevant document"):
        read_retrieval(beir)
    with pytest.raises(InputError, match="no judgements for split 'dev'; it has test"):
        read_retrieval(beir, "dev")
    (beir / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match="a folder in the BEIR layout"):
        read_retrieval(beir)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"_id": "a", "text": "twice"}, "line 4: '_id' 'a' appears twice"),
        ({"text": "nameless"}, "line 4: no '_id'"),
        ({"_id": "d"}, "line 4: no column 'text'"),
        ({"_id": "d", "title": ""}, "line 4: no column 'text'"),
        ({"_id": "d", "text": 3}, "line 4: column 'text' must be text, got int"),
        ({"_id": "d", "title": "t", "text": 3}, "line 4: column 'text' must be text, got int"),
        ({"_id": "d", "text": "\ud800"}, "line 4: column 'text' holds a lone surrogate"),
        ({"_id": "d", "title": "\ud800", "text": "x"}, "line 4: column 'title' holds a lone surrogate"),
        ([1], "line 4: each line must be a JSON object"),
    ],
)
def test_a_bad_document_is_named_by_file_and_line(beir, record, said):
    with (beir / "corpus.jsonl").open("a") as stream:
        stream.write(json.dumps(record) + "\n")
    with pytest.raises(InputError, match=rf"corpus\.jsonl {said}"):
        read_retrieval(beir)


def test_a_document_without_title_and_text_is_kept_blank(beir):
    with (beir / "corpus.jsonl").open("a") as stream:
        for n, record in enumerate(({"text": ""}, {"title": " ", "text": "\n"}, {"title": None, "text": None})):
            stream.write(json.dumps({"_id": f"blank{n}", **record}) + "\n")
    with (beir / "qrels/test.tsv").open("a") as stream:
        stream.write("q2\tblank1\t3\n")
    got = read_retrieval(beir)
    assert got.documents == ["Title body", "text alone", "title alone", "", "", ""]
    assert got.written.tolist() == [0, 1, 2]
    assert got.texts == got.documents[:3]
    assert got.judged.documents.tolist() == [0, 2, 0, 4]


def test_a_corpus_of_blank_documents_and_a_blank_query_are_refused(beir):
    jsonl(beir / "corpus.jsonl", *({"_id": key, "text": " "} for key in "abc"))
    with pytest.raises(InputError, match=r"corpus\.jsonl: no document has a title or a text"):
        read_retrieval(beir)
    jsonl(beir / "corpus.jsonl", *({"_id": key, "text": "x"} for key in "abc"))
    jsonl(beir / "queries.jsonl", {"_id": "q0", "text": "question"}, {"_id": "q1", "text": " "})
    with pytest.raises(InputError, match=r"queries\.jsonl line 2: column 'text' is empty"):
        read_retrieval(beir)


def test_pairs_from_every_kind_of_file(tmp_path):
    records = [{"anchor": "a", "positive": "p", "negative_2": "n2", "negative": "n", "group": 7}]
    plain = jsonl(tmp_path / "x.jsonl", *records)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "x.csv").write_text('anchor,positive,negative,negative_2,group\na,p,"n",n2,7\n')
    (tmp_path / "x.tsv").write_text("anchor\tpositive\tnegative\tnegative_2\tgroup\na\tp\tn\tn2\t7\n")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet")
    for ending in ("jsonl", "jsonl.gz", "csv", "tsv", "parquet"):
        got = read_pairs(tmp_path / f"x.{ending}")
        assert (got.anchors, got.positives, got.negatives, got.groups) == (["a"], ["p"], [["n"], ["n2"]], ["7"])
        assert len(got) == 1


def test_bad_pairs(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        read_pairs(empty)
    mixed = jsonl(tmp_path / "m.jsonl", {"anchor": "a", "positive": "p", "group": 1}, {"anchor": "a", "positive": "p"})
    with pytest.raises(InputError, match="line 2: column 'group' is missing"):
        read_pairs(mixed)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b"{", "line 1: not JSON"),
        ("x.jsonl", b"\xff\xfe{}", "UTF-8"),
        ("x.jsonl.gz", b"not gzip", "not a readable"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-12], "not a readable"),
        ("x.csv", b"a,b\n1\n", "line 2: expected 2 columns"),
        ("x.csv", b"a,b\n1,2,3\n", "line 2: expected 2 columns"),
        ("x.parquet", b"PAR1", "not a readable Parquet"),
        ("x.xml", b"", "unknown kind of file"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        list(rows(tmp_path / name))


def test_a_gzip_flipped_in_the_middle_is_refused(tmp_path):
    data = bytearray(gzip.compress(json.dumps({"text": "abc" * 500}).encode()))
    for at in range(10, len(data)):
        damaged = bytes(data[:at]) + bytes([data[at] ^ 0x55]) + bytes(data[at + 1 :])
        (tmp_path / "x.jsonl.gz").write_bytes(damaged)
        with pytest.raises(InputError):
            list(rows(tmp_path / "x.jsonl.gz"))


def test_no_such_file(tmp_path):
    for read in (read_pairs, read_sts, read_vectors):
        with pytest.raises(InputError, match="no such file"):
            read(tmp_path / "none.jsonl")


def test_sts(tmp_path):
    good = [{"sentence1": "a", "sentence2": "b", "score": n} for n in (1, 2.5)]
    got = read_sts(jsonl(tmp_path / "dev.jsonl", *good))
    assert (got.name, got.first, got.second, got.scores.tolist()) == ("dev", ["a", "a"], ["b", "b"], [1, 2.5])
    for bad in ({"score": "high"}, {"score": None}, {}):
        with pytest.raises(InputError, match="line 3: 'score' must be a number"):
            read_sts(jsonl(tmp_path / "x.jsonl", *good, {"sentence1": "a", "sentence2": "b", **bad}))
    pairs = [{"anchor": "a", "positive": "b", "score": n} for n in (0, 1)]
    assert read_sts(jsonl(tmp_path / "pairs.jsonl", *pairs)).second == ["b", "b"]
    (tmp_path / "nan.csv").write_text("sentence1,sentence2,score\na,b,1\na,b,nan\n")
    with pytest.raises(InputError, match="line 3: 'score' must be finite, got 'nan'"):
        read_sts(tmp_path / "nan.csv")
    for few in (good[:1], [good[0], good[0]]):
        with pytest.raises(InputError, match="at least two pairs"):
            read_sts(jsonl(tmp_path / "x.jsonl", *few))


def test_labelled_texts(tmp_path):
    good = [{"text": "a", "label": "x"}, {"text": "b", "label": 3}]
    got = read_labelled(jsonl(tmp_path / "x.jsonl", *good))
    assert (got.texts, got.labels, len(got)) == (["a", "b"], ["x", "3"], 2)
    for label, said in ((None, "is missing"), (" ", "is missing"), (True, "must be text or a whole number, got True"),
                        (1.5, "must be text or a whole number, got 1.5")):  # fmt: skip
        with pytest.raises(InputError, match=f"line 3: column 'label' {said}; name the row's class or remove the row"):
            read_labelled(jsonl(tmp_path / "x.jsonl", *good, {"text": "c", "label": label}))
    with pytest.raises(InputError, match=r"at least two classes in columns text and label, got \['x'\]"):
        read_labelled(jsonl(tmp_path / "x.jsonl", good[0], good[0]))
    assert read_texts(tmp_path / "x.jsonl") == ["a", "a"]
    with pytest.raises(InputError, match="no rows; expected a column text"):
        read_texts(jsonl(tmp_path / "empty.jsonl"))


def test_vectors_from_every_kind_of_file(tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    from safetensors.numpy import save_file

    save_file({"only": x}, tmp_path / "x.safetensors")
    save_file({"a": x, "b": x}, tmp_path / "two.safetensors")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"vector": x.tolist()}), tmp_path / "x.parquet")
    for ending in ("npy", "safetensors", "parquet"):
        np.testing.assert_array_equal(read_vectors(tmp_path / f"x.{ending}"), x)
    assert isinstance(read_vectors(tmp_path / "x.npy"), np.memmap)
    with pytest.raises(InputError, match="expected one tensor"):
        read_vectors(tmp_path / "two.safetensors")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable file of vectors"):
        read_vectors(tmp_path / "object.npy")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(InputError, match="unknown kind of vectors"):
        read_vectors(tmp_path / "x.bin")


def test_damaged_files_of_vectors_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from safetensors.numpy import save_file

    save_file({"only": np.ones((50, 4), np.float32)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    np.save(tmp_path / "x.npy", np.ones((50, 4), np.float32))
    for name, content in (
        ("x.safetensors", whole[:-8]),
        ("x.safetensors", b"\xff" * 100),
        ("x.npy", (tmp_path / "x.npy").read_bytes()[:-8]),
        ("x.npy", b""),
        ("x.parquet", b"PAR1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="not a readable"):
            read_vectors(tmp_path / name)
    for column, values, said in (
        ("other", [[1.0]], "line 1: no column 'vector'; it has 'other'"),
        ("vector", [[1.0, 2.0], [1.0]], "line 2: 'vector' must be a list of as many numbers in every row, got 1 of"),
        ("vector", [[1.0], None], "line 2: 'vector' must be a list .* got NoneType"),
        ("vector", [[1.0, None]], "row 0 holds NaN|not a readable file of vectors"),
        ("vector", [], "no rows"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({column: values}), tmp_path / "x.parquet")
        with pytest.raises(InputError, match=said):
            read_vectors(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        read_vectors(tmp_path)
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        read_pairs(tmp_path)


def test_bad_vectors_are_named():
    x = np.ones((3, 4))
    assert check_vectors(x).dtype == np.float32
    for value, said in ((np.nan, "row 1 holds NaN or Inf"), (np.inf, "row 1 holds NaN or Inf")):
        bad = x.copy()
        bad[1, 2] = value
        with pytest.raises(InputError, match=said):
            check_vectors(bad)
    x[2] = 0
    with pytest.raises(InputError, match="row 2 is all zeros"):
        check_vectors(x)
    with pytest.raises(InputError, match="expected width 5, got 4"):
        check_vectors(np.ones((3, 4)), width=5)
    for wrong in (np.ones(3), np.ones((3, 4), int)):
        with pytest.raises(InputError, match="floating point"):
            check_vectors(wrong)


def test_bad_texts_are_named():
    assert check_texts(("a", "b")) == ["a", "b"]
    with pytest.raises(InputError, match=r"queries\[1\] is empty"):
        check_texts(["a", " \n"], "queries")
    assert check_texts(["a", " \n"], "documents", blank=True) == ["a", " \n"]
    with pytest.raises(InputError, match=r"texts\[0\] must be text, got int"):
        check_texts([1])
    with pytest.raises(InputError, match=r"texts\[1\] holds a lone surrogate"):
        check_texts(["a", "b\udcff"])
