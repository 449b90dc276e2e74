import os

import pytest

from matryo.core import errors
from matryo.core.errors import MissingExtraError, StorageError
from matryo.core.files import digest, fsync_file, fsync_folder, storage_errors, write_atomically, write_text


def test_a_name_points_at_a_whole_file(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.txt"]
    fsync_file(path)
    fsync_folder(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(StorageError, match=r"writing .*x\.txt: No space left"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_an_error_of_the_writer_passes_and_leaves_nothing(tmp_path):
    def fail(temporary):
        temporary.write_text("half")
        raise KeyError("mine")

    with pytest.raises(KeyError):
        write_atomically(tmp_path / "x", fail)
    assert not os.listdir(tmp_path)


def test_storage_errors_are_not_wrapped_twice():
    with pytest.raises(StorageError, match=r"^first$"), storage_errors("second"):
        raise StorageError("first")


def test_digest_sees_every_byte(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    first = digest(path)
    assert len(first) == 32
    path.write_bytes(b"abd")
    assert digest(path) != first


def test_errors_are_of_one_tree_and_of_their_python_kind():
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.StorageError, OSError)
    for name in ("InputError", "FormatError", "DamagedError", "LockedError", "StorageError", "MissingExtraError"):
        assert issubclass(getattr(errors, name), errors.MatryoError)
    missing = MissingExtraError("scikit-learn", "eval", "PCA")
    assert str(missing) == "PCA needs scikit-learn, which is not installed; add it with: pip install 'matryo[eval]'"
    assert isinstance(missing, ImportError)
    assert (missing.package, missing.extra) == ("scikit-learn", "eval")
