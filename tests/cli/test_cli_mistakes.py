"""Mistakes of the user: exit status 2, one line on standard error that says what to do, and nothing lost."""

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from matryo.cli import run

FULL_DISK = """
import resource, signal, sys
import matryo.index, numpy
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from matryo.cli import run
sys.exit(run(sys.argv[2:]))
"""


def state(folder: Path) -> dict[str, str]:
    """Name and digest of every file, but those that say who is reading."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    }


@pytest.fixture
def mistake(capsys):
    """Run a command line that has to be refused; the line it said."""

    def go(*arguments, said: str) -> str:
        status = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 2, err
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("matryo: ")
        assert said in lines[0]
        return lines[0]

    return go


@pytest.fixture
def index(dev_folder, tmp_path, capsys):
    folder = tmp_path / "docs.matryo"
    assert run(["index", "build", str(dev_folder), "--model", "toy", "--out", str(folder)]) == 0
    capsys.readouterr()
    return folder


def test_a_mistake_in_a_real_process(python, tmp_path):
    """What the fixture above checks in this process, seen from outside."""
    (tmp_path / "p.csv").write_text("anchor,other\na,b\n")
    ran = python("-m", "matryo", "train", tmp_path / "p.csv", "--out", tmp_path / "model")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr == f"matryo: {tmp_path}/p.csv line 2: no column 'positive'; it has 'anchor', 'other'\n"
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("anchor\nonly\n", "line 2: no column 'positive'; it has 'anchor'"),
        ("anchor,positive\na,b\nc,\n", "line 3: column 'positive' is empty"),
        ("anchor,positive\na,b\nc\n", "line 3: expected 2 columns"),
        ("anchor,positive\n", "no rows"),
        ("anchor,positive\na,b\n", "at least 2 pairs, got 1"),
    ],
)
def test_pairs(mistake, tmp_path, text, said):
    (tmp_path / "p.csv").write_text(text)
    mistake("train", tmp_path / "p.csv", "--out", tmp_path / "model", said=said)
    assert not (tmp_path / "model").exists()


def test_train_options(mistake, pairs_file, tmp_path):
    model = tmp_path / "model"
    mistake("train", pairs_file, "--out", model, "--widths", "8;16", said="--widths takes numbers separated by commas")
    mistake("train", pairs_file, "--out", model, "--dim", 32, "--widths", "8,16", said="ends at width 16")
    mistake("train", pairs_file, "--out", model, "--epochs", "many", said="Invalid value for '--epochs'")
    mistake("train", pairs_file, "--out", model, "--no-such-option", said="No such option: --no-such-option")
    mistake("train", pairs_file, "--out", model, "--resume", said="no checkpoint to resume from")
    mistake("train", tmp_path / "none.jsonl", "--out", model, said="no such file")
    mistake("train", "--out", model, said="pairs: Field required")
    mistake("train", pairs_file, "--out", "/proc/nowhere", "--dim", 32, said="creating /proc/nowhere/checkpoints: ")
    mistake("demo", "--out", pairs_file, said=f"{pairs_file} is a file; choose a folder")
    mistake("train", tmp_path, "--out", model, said=f"{tmp_path} is a folder; name a file in it")
    for tau in ("0", "-1", "nan", "0.1,0"):
        mistake(
            "train", pairs_file, "--out", model, "--temperature", tau, said="temperature must be finite and above 0"
        )
    mistake("train", pairs_file, "--out", model, "--weights", "1,2", said="TrainConfig: weights need widths")
    mistake("train", pairs_file, "--out", model, "--device", "toaster", said="device 'toaster' cannot be used")
    mistake("fly", said="No such command 'fly'")
    assert not model.exists()


def test_vectors(mistake, dev_folder, tmp_path, index):
    vectors = np.random.default_rng(0).standard_normal((120, 64)).astype(np.float32)
    out = tmp_path / "new.matryo"
    vectors[7, 3] = np.nan
    np.save(tmp_path / "nan.npy", vectors)
    mistake(
        "index", "build", dev_folder, "--vectors", tmp_path / "nan.npy", "--out", out, said="row 7 holds NaN or Inf"
    )
    np.save(tmp_path / "few.npy", np.ones((3, 64), np.float32))
    before = state(index)
    mistake("index", "add", index, dev_folder, "--vectors", tmp_path / "few.npy", said="has 3 rows for 120 documents")
    np.save(tmp_path / "narrow.npy", np.ones((120, 9), np.float32))
    mistake(
        "index",
        "add",
        index,
        dev_folder,
        "--vectors",
        tmp_path / "narrow.npy",
        said="expected (N, 64) numbers, got shape (120, 9)",
    )
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    mistake("index", "add", index, dev_folder, "--vectors", tmp_path / "pickle.npy", said="not a readable file")
    assert state(index) == before
    assert not out.exists()


def test_search(mistake, index, tmp_path):
    before = state(index)
    mistake("search", index, "mail", "--plan", "32:wavelet keep 9 > 64:float32", said="unknown code 'wavelet'")
    mistake("search", index, "mail", "--plan", "32:int8 tree keep 9 > 64:float32", said="unknown scan 'tree'")
    mistake("search", index, "mail", "--plan", "99:float32", said="outside 1..64")
    mistake("search", index, "mail", "--where", "{", said="--where is not JSON")
    mistake("search", index, "mail", "--where", "[1]", said="--where must be a JSON object")
    mistake("search", index, " ", said="inputs[0] is empty")
    mistake("search", index, "mail", "\udcff", said="inputs[1] holds a lone surrogate")
    mistake("search", index, "mail", "-k", "0", said="0")
    mistake("search", tmp_path / "nowhere", "mail", said="holds no index")
    assert state(index) == before


def test_indexing_twice_into_one_folder(mistake, index, dev_folder):
    before = state(index)
    mistake("index", "build", dev_folder, "--model", "toy", "--out", index, said="already")
    assert state(index) == before


def test_documents(mistake, index, tmp_path):
    before = state(index)
    file = tmp_path / "more.jsonl"
    for rows, said in (
        ([{"text": "no id"}], "line 1: no '_id' or 'id'; it has 'text'"),
        ([{"id": "a", "text": "x"}, {"id": "b"}], "line 2: no column 'text'; it has 'id'"),
        ([{"id": "a", "text": "x"}, {"id": "b", "text": 3}], "line 2: column 'text' must be text, got int"),
        ([{"id": "a", "text": " "}, {"id": "b", "title": "", "text": None}], "no document has a title or a text"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "id 'a' appears twice"),
        ([], "no rows"),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        mistake("index", "add", index, file, said=said)
    file.write_text('{"id": "a", "text": "x"}\n')
    mistake("index", "add", index, file, "--metadata", "section", said="line 1: no column 'section' for metadata")
    mistake("index", "build", file, "--out", tmp_path / "x", said="give --model to encode the documents, or --vectors")
    assert state(index) == before


def test_index_of_another_format(mistake, index):
    connection = sqlite3.connect(index / "catalogue.sqlite")
    body, _ = connection.execute("SELECT body, digest FROM state").fetchone()
    newer = json.dumps({**json.loads(body), "format": 99}, sort_keys=True)
    digest = hashlib.blake2b(newer.encode(), digest_size=16).digest()
    connection.execute("UPDATE state SET body = ?, digest = ?", (newer, digest))
    connection.commit()
    connection.close()
    mistake("index", "stats", index, said="in format 99 and this release reads formats 1 and 2")


def test_flipped_byte_is_found(mistake, index):
    path = max(index.glob("vectors-*.f16"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    mistake("index", "check", index, said=path.name)


def test_evaluation(mistake, dev_folder, tmp_path, pairs_file):
    mistake("eval", "toy", tmp_path / "nowhere", said="no such task")
    mistake("eval", "toy", dev_folder, "--split", "train", said="no judgements for split 'train'; it has dev, test")
    mistake("eval", "toy", dev_folder, "--codes", "int7", said="unknown code 'int7'")
    mistake("eval", "toy", dev_folder, "--widths", "65", said="outside 1..64")
    mistake("eval", "toy", dev_folder, "--metric", "accuracy", said="unknown metric 'accuracy'")
    mistake("eval", "toy", dev_folder, "--baselines", "magic", said="unknown baseline 'magic'")
    mistake("eval", "toy", dev_folder, "--separate", "x=toy", said="--separate takes WIDTH=MODEL or train, got 'x=toy'")
    mistake("eval", "toy", dev_folder, "--separate", "train", said="toy does not say how it was trained")
    mistake("eval", "toy", dev_folder, "--twin", "train", said="toy does not say how it was trained")
    # Said at once, not after minutes of measuring: the model named here does not even exist.
    for option in ("--report", "--out"):
        mistake("eval", "none/x/y", dev_folder, option, tmp_path / "no/r.html", said="its folder is not there; make it")
    mistake("eval", "none/x/y", dev_folder, "--report", tmp_path / "r.pdf", said="saved as .html, .json or .txt")
    mistake("eval", "matryo-tests/none", dev_folder, said="cannot load model 'matryo-tests/none'")
    unjudged = shutil.copytree(dev_folder, tmp_path / "unjudged")
    (unjudged / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    mistake("eval", "toy", unjudged, said="no query has a relevant document")


def test_full_disk_keeps_what_was_there(python, index, dev_folder, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"id": f"n{n}", "text": f"text {n}"}) + "\n" for n in range(500)))
    ran = python("-c", FULL_DISK, 40_000, "index", "add", index, more)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("\n") == 1
    assert "File too large" in ran.stderr
    assert run(["index", "check", str(index)]) == 0
    ran = python("-m", "matryo", "index", "stats", index, "--json")
    assert json.loads(ran.stdout)["items"] == 120
