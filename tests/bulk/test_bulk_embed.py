"""Every row once, in order, with the vector that the model gives it; a stopped run goes on to the same bytes."""

import json
import random
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file, save_file

import matryo as mt
from matryo.bulk import Bulk, check, embed
from matryo.bulk import encode as encoding
from matryo.bulk.parts import cut
from matryo.cli import run
from matryo.core.codecs import codec
from matryo.core.errors import DamagedError, InputError, NoIndexError
from matryo.core.records import document_of
from matryo.core.streams import open_vectors


def table_of(out):
    """All parts in the order of their names."""
    return pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in sorted(out.glob("*.parquet"))])


def vectors_of(table):
    column = table.column("vector").combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)


@pytest.mark.parametrize("code", ["float32", "float16", "int8", "binary"])
@pytest.mark.parametrize("width", [8, None])
def test_vectors_are_the_models(trained, corpus, tmp_path, code, width):
    out = tmp_path / "vectors"
    found = embed(trained, [corpus], out, Bulk(width=width, code=code, part_rows=100))
    model = mt.load(trained)
    texts = [
        row["text"]
        for name in ("one", "two")
        for row in pyarrow.parquet.read_table(corpus / f"{name}.parquet").to_pylist()
    ]
    kept = [text for text in texts if text and text.strip()]
    table = table_of(out)
    expected = model.encode(kept, width=width, code=code)
    np.testing.assert_array_equal(vectors_of(table), expected)
    assert vectors_of(table).dtype == expected.dtype
    assert (found["read"], found["rows"], found["left_out"]) == (400, len(kept), 400 - len(kept))
    about = json.loads(table.schema.metadata[b"matryo"])
    assert (about["width"], about["code"]) == (width or model.width, code)
    if code == "int8":
        state = {"scale": np.array(about["scale"], np.float32)}
        scaled = codec("int8", about["width"]).load(state)
        np.testing.assert_array_equal(scaled.encode(model.encode(kept, width=width)), expected)


def test_parts_are_named_after_the_input_and_rows_keep_their_numbers(corpus, tmp_path):
    found = embed("toy", [corpus / "two.parquet", corpus / "one.parquet"], tmp_path / "v", Bulk(part_rows=100))
    assert [part["name"] for part in found["parts"]] == [
        "part-00000-00000.parquet",
        "part-00000-00003.parquet",
        "part-00000-00006.parquet",
        "part-00001-00000.parquet",
    ]
    assert [(part["file"], part["first_row"], part["read"]) for part in found["parts"]] == [
        ("one.parquet", 0, 120),
        ("one.parquet", 120, 120),
        ("one.parquet", 240, 60),
        ("two.parquet", 0, 100),
    ]
    blanks = list(range(0, 100, 7))
    assert found["parts"][3]["rows_left_out"] == blanks
    second = pyarrow.parquet.read_table(tmp_path / "v" / "part-00001-00000.parquet")
    assert second.column_names == ["row", "_id", "vector"]
    assert second.column("row").to_pylist() == [n for n in range(100) if n not in blanks]
    assert second.column("_id").to_pylist() == [f"e{n}" for n in range(100) if n not in blanks]
    third = pyarrow.parquet.read_table(tmp_path / "v" / "part-00000-00006.parquet")
    assert third.column("row").to_pylist() == list(range(240, 300))


def test_any_cut_covers_every_row_once(write):
    rng = random.Random(0)
    for n in range(40):
        rows, group, part_rows = rng.randint(1, 60), rng.randint(1, 20), rng.randint(1, 70)
        path = write(f"{n}.parquet", {"text": ["a"] * rows}, group)
        _, parts = cut([path], Bulk(part_rows=part_rows))
        assert [row for part in parts for row in range(part.start, part.start + part.rows)] == list(range(rows))
        assert all(part.rows >= part_rows for part in parts[:-1])
        assert all(part.rows < part_rows + group for part in parts)
        assert len({part.name for part in parts}) == len(parts)


def test_titles_are_joined_as_an_index_joins_them(write, tmp_path):
    rows = [
        {"title": " chess ", "text": " a board game "},
        {"title": None, "text": " a board game "},
        {"title": "chess", "text": None},
        {"title": " ", "text": "\t"},
    ]
    path = write("t.parquet", {name: [row[name] for row in rows] for name in ("text", "title")})
    embed("toy", [path], tmp_path / "v")
    texts = [document_of(path, n, row) for n, row in enumerate(rows)]
    table = table_of(tmp_path / "v")
    assert table.column("row").to_pylist() == [0, 1, 2]
    np.testing.assert_array_equal(vectors_of(table), mt.load("toy").encode(texts[:3]))


def test_columns_are_chosen_and_copied(write, tmp_path):
    columns = {"id": [1, 2], "name": ["chess", "editor"], "about": ["a game", "for text"], "price": [1.5, None]}
    path = write("c.parquet", columns)
    embed("toy", [path], tmp_path / "v", Bulk(columns=("name", "about"), keep=("price", "name")))
    table = table_of(tmp_path / "v")
    assert table.select(["row", "price", "name"]).to_pydict() == {
        "row": [0, 1], "price": [1.5, None], "name": ["chess", "editor"]
    }  # fmt: skip
    np.testing.assert_array_equal(vectors_of(table), mt.load("toy").encode(["chess a game", "editor for text"]))


def test_a_part_is_written_in_row_groups_and_read_as_vectors(corpus, tmp_path, monkeypatch):
    embed("toy", [corpus / "one.parquet"], tmp_path / "whole")
    monkeypatch.setattr(encoding, "BATCH", 16)
    monkeypatch.setattr(encoding, "GROUP_BYTES", 10_000)
    embed("toy", [corpus / "one.parquet"], tmp_path / "groups")
    one, two = (tmp_path / name / "part-00000-00000.parquet" for name in ("whole", "groups"))
    assert pyarrow.parquet.ParquetFile(one).num_row_groups == 1
    assert pyarrow.parquet.ParquetFile(two).num_row_groups > 5
    assert pyarrow.parquet.read_table(one).equals(pyarrow.parquet.read_table(two))
    embed("toy", [corpus / "one.parquet"], tmp_path / "half", Bulk(code="float16"))
    half = open_vectors(tmp_path / "half" / "part-00000-00000.parquet")
    assert (half.rows, half.width) == (300, 64)
    assert next(half.parts(300)).dtype == np.float32
    stream = open_vectors(two)
    assert (stream.rows, stream.width) == (300, 64)
    np.testing.assert_array_equal(np.concatenate(list(stream.parts(50))), vectors_of(pyarrow.parquet.read_table(one)))


def test_a_part_of_blanks_alone_is_there_and_empty(write, tmp_path):
    path = write("b.parquet", {"text": ["one", "two", None, ""]}, group=2)
    found = embed("toy", [path], tmp_path / "v", Bulk(part_rows=2))
    assert [part["rows"] for part in found["parts"]] == [2, 0]
    assert check(tmp_path / "v") == found


def test_the_same_command_keeps_what_is_whole_and_makes_the_rest_again(corpus, tmp_path, files_of):
    options = Bulk(part_rows=100)
    embed("toy", [corpus], tmp_path / "v", options)
    whole = files_of(tmp_path / "v")
    parts = sorted((tmp_path / "v").glob("*.parquet"))
    bad = bytearray(parts[0].read_bytes())
    bad[500] ^= 1
    parts[0].write_bytes(bad)
    parts[1].unlink()
    (tmp_path / "v" / "records" / f"{parts[2].name}.json").write_text("{")
    before = {path: path.stat().st_ino for path in parts if path.exists()}
    seen = []
    embed("toy", [corpus], tmp_path / "v", options, report=seen.append)
    assert files_of(tmp_path / "v") == whole
    after = {path: path.stat().st_ino for path in parts}
    assert [path.name for path in before if before[path] == after[path]] == [path.name for path in parts[3:]]
    assert [(step.parts, step.of, step.rows_of) for step in seen] == [(n, 4, 400) for n in (1, 2, 3, 4)]


def test_another_job_is_refused_by_name(trained, corpus, write, tmp_path):
    out = tmp_path / "v"
    embed(trained, [corpus], out, Bulk(width=16))
    cases = [
        ({"options": Bulk(width=8)}, "was begun with width 16, not 8"),
        ({"options": Bulk(width=16, code="binary")}, "was begun with code float32, not binary"),
        ({"options": Bulk(width=16, part_rows=10)}, "was begun with part_rows 65536, not 10"),
        ({"model": "toy", "options": Bulk(width=16)}, "was begun with another model"),
        ({"inputs": [corpus / "one.parquet"]}, r"other inputs \(no two.parquet\)|other inputs \(also two.parquet\)"),
    ]
    for changed, said in cases:
        given = {"model": trained, "inputs": [corpus], "options": Bulk(width=16), **changed}
        with pytest.raises(InputError, match=said):
            embed(given["model"], given["inputs"], out, given["options"])
    write("two.parquet", {"_id": ["x"], "text": ["another text"]})
    with pytest.raises(InputError, match=r"other inputs \(another two.parquet\); give what it was begun with"):
        embed(trained, [corpus], out, Bulk(width=16))
    assert check(out)["read"] == 400


def test_other_int8_ranges_are_another_model(trained, corpus, tmp_path):
    model = shutil.copytree(trained, tmp_path / "model")
    embed(model, [corpus], tmp_path / "v", Bulk(width=16, code="int8"))
    scales = load_file(model / "matryo.safetensors")
    save_file({name: value * 2 for name, value in scales.items()}, model / "matryo.safetensors")
    with pytest.raises(InputError, match="was begun with another model"):
        embed(model, [corpus], tmp_path / "v", Bulk(width=16, code="int8"))


def test_check_finds_what_is_not_as_recorded(corpus, tmp_path):
    out = tmp_path / "v"
    with pytest.raises(NoIndexError, match="holds no finished bulk encoding"):
        check(out)
    found = embed("toy", [corpus], out, Bulk(part_rows=100))
    assert check(out) == found
    part = out / found["parts"][1]["name"]
    content = part.read_bytes()
    for damage in (content[:-1], content[:700] + bytes([content[700] ^ 4]) + content[701:]):
        part.write_bytes(damage)
        with pytest.raises(DamagedError, match=r"part-00000-00003.parquet missing, changed or one too many"):
            check(out)
    part.unlink()
    with pytest.raises(DamagedError, match=r"part-00000-00003.parquet missing"):
        check(out)
    part.write_bytes(content)
    double = out / "part-00009-00000.parquet"
    double.write_bytes(content)
    with pytest.raises(DamagedError, match=r"part-00009-00000.parquet missing, changed or one too many"):
        check(out)
    double.unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    for name, value in (("rows", 1), ("checksum", "0" * 32), ("parts", manifest["parts"][:-1]), ("parts", 3)):
        (out / "manifest.json").write_text(json.dumps({**manifest, name: value}))
        with pytest.raises(DamagedError):
            check(out)
    (out / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(DamagedError, match="is not of format 1"):
        check(out)


def test_a_part_with_ids_and_texts_is_a_table_to_index(corpus, tmp_path):
    out = tmp_path / "v"
    embed("toy", [corpus / "two.parquet"], out, Bulk(code="float16", keep=("_id", "text")))
    line = ["index", "build", str(out / "part-00000-00000.parquet"), "--out", str(tmp_path / "docs.matryo")]
    assert run(line) == 0
    asked = pyarrow.parquet.read_table(corpus / "two.parquet").column("text")[5].as_py()
    with mt.Index.open(tmp_path / "docs.matryo", read_only=True) as index:
        assert len(index) == 85
        hits = index.search(mt.load("toy").encode([asked]), k=1)
    assert (hits.ids[0], hits.documents[0]) == (["e5"], [asked])
