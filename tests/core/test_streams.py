"""Vectors read in parts are the vectors of the file, whatever its kind, and a bad row is named by its number."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.streams import fingerprint, open_vectors

BASE = np.random.default_rng(0).standard_normal((101, 6)).astype(np.float32)


def parquet(path, rows, kind=None, group=30):
    column = pyarrow.array([None if row is None else list(row) for row in rows], type=kind)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), "vector": column}), path, row_group_size=group)
    return path


def write(folder, kind, base=BASE):
    path = folder / f"v{kind}"
    if kind == ".npy":
        np.save(path, base)
    elif kind == ".safetensors":
        save_file({"v": base}, path)
    else:
        parquet(path, base, pyarrow.list_(pyarrow.float32()))
    return path


@pytest.fixture(scope="module", params=[".npy", ".safetensors", ".parquet"])
def path(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("v"), request.param)


@given(size=st.integers(1, 120), start=st.integers(0, 101))
@settings(max_examples=40, deadline=None)
def test_parts_are_the_rows_from_there_on(path, size, start):
    stream = open_vectors(path)
    assert (stream.rows, stream.width) == (101, 6)
    parts = list(stream.parts(size, start))
    assert all(len(part) == size for part in parts[:-1])
    assert all(part.dtype == np.float32 for part in parts)
    np.testing.assert_array_equal(np.concatenate([*parts, BASE[:0]]), BASE[start:])


@pytest.mark.parametrize("kind", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize(("value", "says"), [(np.nan, "holds NaN or Inf"), (0, "is all zeros")])
def test_a_bad_row_is_named_wherever_it_stands(tmp_path, kind, value, says):
    base = BASE.copy()
    base[77] = value
    stream = open_vectors(write(tmp_path, kind, base))
    for size, start in ((10, 0), (200, 0), (7, 60)):
        with pytest.raises(InputError, match=f"row 77 {says}"):
            list(stream.parts(size, start))


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_other_widths_of_numbers_and_orders(tmp_path, kind):
    for n, base in enumerate((BASE.astype(kind), np.asfortranarray(BASE.astype(kind)))):
        np.save(tmp_path / f"{n}.npy", base)
        np.testing.assert_array_equal(np.concatenate(list(open_vectors(tmp_path / f"{n}.npy").parts(8))), base)
    fixed = parquet(tmp_path / "f.parquet", BASE.astype(kind), pyarrow.list_(pyarrow.from_numpy_dtype(kind), 6))
    np.testing.assert_array_equal(np.concatenate(list(open_vectors(fixed).parts(8))), BASE.astype(kind))


def test_what_is_no_file_of_vectors_is_refused(tmp_path):
    np.save(tmp_path / "flat.npy", BASE[0])
    np.save(tmp_path / "whole.npy", BASE.astype(int))
    np.save(tmp_path / "none.npy", BASE[:0])
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "torn.safetensors").write_bytes(b"x" * 30)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "v.txt").write_text("1 2")
    save_file({"a": BASE, "b": BASE}, tmp_path / "two.safetensors")
    save_file({"a": BASE.astype(np.int8)}, tmp_path / "int.safetensors")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "no.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"vector": ["x"]}), tmp_path / "text.parquet")
    for name, says in (
        ("flat.npy", r"expected \(N, D\) floating point, got shape \(6,\) of float32"),
        ("whole.npy", "floating point, got shape .* of int64"),
        ("none.npy", "no rows"),
        ("torn.npy", "not a readable file of vectors"),
        ("torn.safetensors", "not a readable file of vectors"),
        ("torn.parquet", "not a readable Parquet file"),
        ("v.txt", "use .npy, .safetensors or .parquet"),
        ("two.safetensors", r"expected one tensor, it holds \['a', 'b'\]"),
        ("int.safetensors", "got I8"),
        ("no.parquet", "no column 'vector'; it has 'id'"),
        ("text.parquet", "column 'vector' must be lists of floating point numbers, it is string"),
        ("nowhere.npy", "no such file"),
    ):
        with pytest.raises(InputError, match=says):
            open_vectors(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (None, "line 51: 'vector' must be a list of as many numbers in every row, got nothing"),
        ([1.0, 2.0], "line 51: .* got 2 of them"),
        ([1.0, None, 1, 1, 1, 1], "line 51: .* got a null among them"),
    ],
)
def test_a_ragged_column_names_its_line(tmp_path, row, says):
    rows = [list(row) for row in BASE.tolist()]
    rows[50] = row
    stream = open_vectors(parquet(tmp_path / "v.parquet", rows, pyarrow.list_(pyarrow.float32())))
    with pytest.raises(InputError, match=says):
        list(stream.parts(16))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path, ".parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'matryo\[parquet\]'"):
        open_vectors(path)


def test_a_fingerprint_follows_content_and_length(tmp_path):
    one, two, large = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    one.write_bytes(b"x" * 200_000)
    two.write_bytes(b"x" * 200_000)
    assert fingerprint(one) == fingerprint(two)
    two.write_bytes(b"x" * 100_000 + b"y" + b"x" * 99_999)
    assert fingerprint(one) != fingerprint(two)
    two.write_bytes(b"x" * 200_001)
    assert fingerprint(one) != fingerprint(two)
    with large.open("wb") as stream:
        stream.truncate(20 << 20)
    first = fingerprint(large)
    with large.open("r+b") as stream:
        stream.truncate((20 << 20) + 1)
    assert fingerprint(large) != first
