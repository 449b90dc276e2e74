"""Bad input, a full disk, a killed run: one line, and the file is as it was."""

import json
import os
import sys

import numpy as np
import pytest

from matryo.cli import run
from matryo.core.errors import InputError, MissingExtraError
from matryo.mining import Mining, mine

FULL_DISK = """
import resource, signal, sys
import matryo.mining, numpy, pyarrow.parquet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000,) * 2)
from matryo.cli import run
sys.exit(run(sys.argv[1:]))
"""

KILLED = """
import os, sys
import pyarrow.parquet
from matryo.cli import run
from matryo.mining import table

class Writer(pyarrow.parquet.ParquetWriter):
    written = 0
    def write_table(self, *rest, **more):
        if self.written == 3:
            os._exit(9)
        self.written += 1
        super().write_table(*rest, **more)

table.ROW_GROUP = 10
pyarrow.parquet.ParquetWriter = Writer
sys.exit(run(sys.argv[1:]))
"""

WITHOUT_TORCH = """
import json, sys
from matryo.cli import run
status = run(sys.argv[1:])
print(json.dumps(sorted({"torch", "transformers", "sentence_transformers"} & set(sys.modules))), file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture
def mistake(capsys, tmp_path):
    """Run a command line that has to be refused: one line on standard error, nothing written."""

    def go(*arguments, said: str) -> None:
        before = sorted(os.listdir(tmp_path))
        status = run(["mine", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1
        assert said in err
        assert sorted(os.listdir(tmp_path)) == before

    return go


def test_options(mistake, pairs_file, tmp_path):
    line = (pairs_file, "--model", "toy", "--out", tmp_path / "hard.parquet")
    for more, said in (
        (("--margin", "-0.1"), "margin must be at least 0 and below 2, the range of cosines, got -0.1; try 0.05"),
        (("--margin", "2"), "below 2"),
        (("--margin", "nan"), "got nan"),
        (("--relative-margin", "0"), "relative_margin must be above 0 and at most 1"),
        (("--relative-margin", "1.5"), "got 1.5; try 0.95"),
        (("--margin", "0.1", "--relative-margin", "0.9"), "give one of them"),
        (("--widths", "8,65"), "width 65 is outside 1..64"),
        (("--widths", "0,8"), "widths must be integers >= 1, got 0"),
        (("--widths", "16,8"), "widths must rise strictly, got [16, 8]; try [8, 16]"),
        (("--widths", "8;16"), "--widths takes numbers separated by commas"),
        (("--negatives", "0"), "negatives must be a whole number of at least 1, got 0"),
        (("--negatives", "200"), "200 negatives a pair were asked for, but there are 200 distinct candidate texts"),
        (("--negatives", "100", "--widths", "8,64"), "200 negatives a pair were asked for"),
        (("--range", "5"), "--range takes MIN:MAX, two ranks counted from 1, got '5'; for example 10:100"),
        (("--range", "a:b"), "got 'a:b'"),
        (("--range", "0:9"), "the first rank must be a whole number of at least 1, got 0"),
        (("--range", "9:3"), "ranks 9:3 hold 0 candidates"),
        (("--range", "1:2", "--negatives", "3"), "ranks 1:2 hold 2 candidates but 3 negatives were asked for; end the"),
        (("--sample",), "sampling needs a last rank to draw from; for example ranks 1:100"),
        (("--seed", "-1"), "seed must be a whole number of at least 0, got -1"),
        (("--batch-size", "0"), "batch_size must be a whole number of at least 1"),
        (("--corpus", tmp_path / "none.jsonl"), "no such file"),
    ):
        mistake(*line, *more, said=said)


def test_files(mistake, pairs, pairs_file, tmp_path):
    out = tmp_path / "hard.parquet"
    model = ("--model", "toy", "--out", out)
    mistake(tmp_path / "none.jsonl", *model, said="no such file")
    (tmp_path / "p.csv").write_text("anchor,other\na,b\n")
    mistake(tmp_path / "p.csv", *model, said="p.csv line 2: no column 'positive'; it has 'anchor', 'other'")
    one = pairs(("a", "b"))
    mistake(one, *model, said="there is no text but the one positive to mine from; add pairs or a corpus")
    (tmp_path / "c.jsonl").write_text('{"body": "x"}\n')
    mistake(one, *model, "--corpus", tmp_path / "c.jsonl", said="c.jsonl line 1: no column 'text'; it has 'body'")
    (tmp_path / "c.csv").write_text("text\n")
    mistake(one, *model, "--corpus", tmp_path / "c.csv", said="no rows; expected a column text")
    mistake(pairs_file, "--model", "toy", "--out", tmp_path / "hard.jsonl", said="end the name with .parquet")
    mistake(pairs_file, "--model", "toy", "--out", tmp_path / "x" / "hard.parquet", said="no such folder")
    (tmp_path / "folder.parquet").mkdir()
    mistake(pairs_file, "--model", "toy", "--out", tmp_path / "folder.parquet", said="is a folder")
    mistake(pairs_file, "--model", tmp_path / "no" / "model", "--out", out, said="no such model folder")


def test_an_input_is_not_written_over(mistake, pairs_file, tmp_path, capsys):
    same = tmp_path / "same.parquet"
    assert run(["mine", str(pairs_file), "--model", "toy", "--out", str(same)]) == 0
    capsys.readouterr()
    before = same.read_bytes()
    mistake(same, "--model", "toy", "--out", same, said="is an input of this run; choose another file to write")
    assert same.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "vector", "width", "said"),
    [
        ("b", [1.0, np.nan], 1, r"the model gave NaN or Inf at width 2 for anchor 2 of 2, 'b'; remove it or choose"),
        ("q", [np.inf, 1.0], 2, r"the model gave NaN or Inf at width 2 for candidate 2 of 2, 'q'"),
        ("q", [0.0, 1.0], 1, r"the model gave only zeros at width 1 for candidate 2 of 2, 'q'"),
    ],
)
def test_texts_the_model_cannot_encode(model, pairs, tmp_path, text, vector, width, said):
    vectors = {key: [1.0, 1.0] for key in "apbq"} | {text: vector}
    with pytest.raises(InputError, match=said):
        mine(model(vectors), pairs(("a", "p"), ("b", "q")), tmp_path / "hard.parquet", Mining(widths=(width,)))
    assert not (tmp_path / "hard.parquet").exists()


def test_no_pair_with_enough_negatives(model, pairs, tmp_path):
    vectors = {key: [1.0, 1.0] for key in "apbq"}
    with pytest.raises(InputError, match="none of 2 pairs has 1 negatives at every width; ask for fewer, lower the"):
        mine(model(vectors), pairs(("a", "p"), ("b", "q")), tmp_path / "hard.parquet", Mining(margin=0.1))
    assert not (tmp_path / "hard.parquet").exists()


def test_without_pyarrow_nothing_is_encoded(model, pairs, tmp_path, monkeypatch):
    made = model({key: [1.0, 1.0] for key in "apbq"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"writing Parquet needs pyarrow, .* pip install 'matryo\[parquet\]'"):
        mine(made, pairs(("a", "p"), ("b", "q")), tmp_path / "hard.parquet")
    assert made.encoder.asked == []


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_full_disk_and_kill_leave_the_name_as_it_was(python, pairs_file, tmp_path, before):
    out = tmp_path / "hard.parquet"
    line = ("mine", pairs_file, "--model", "toy", "--out", out)
    if before:
        out.write_bytes(before)
    ran = python("-c", FULL_DISK, *line)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("\n") == 1
    assert f"writing {out}" in ran.stderr
    assert "File too large" in ran.stderr
    assert os.listdir(tmp_path) == (["hard.parquet"] if before else [])
    ran = python("-c", KILLED, *line)
    assert ran.returncode == 9, ran.stderr
    assert (out.read_bytes() if before else out.exists()) == (before or False)
    assert python("-m", "matryo", *line).returncode == 0
    assert out.read_bytes()[:4] == b"PAR1"


def test_interrupted(pairs_file, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("matryo.mining.mine", stop)
    assert run(["mine", str(pairs_file), "--model", "toy", "--out", str(tmp_path / "hard.parquet")]) == 130
    assert capsys.readouterr().err == f"matryo: interrupted; nothing was written to {tmp_path}/hard.parquet\n"


def test_static_models_mine_without_torch_and_the_file_trains(python, trained, pairs_file, dev_folder, tmp_path):
    hard, model = tmp_path / "hard.parquet", tmp_path / "model"
    ran = python(
        "-c", WITHOUT_TORCH, "mine", pairs_file, "--model", trained, "--out", hard,
        "--widths", "8,32", "--negatives", 2, "--corpus", dev_folder / "corpus.jsonl", "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "[]\n"
    found = json.loads(ran.stdout)
    assert found["path"] == str(hard)
    assert found["rows"] <= found["pairs"] == 200
    assert [at["width"] for at in found["widths"]] == [8, 32]
    assert found["widths"][1]["columns"] == ["negative_2", "negative_4"]
    assert run(["train", str(hard), "--base", str(trained), "--out", str(model), "--epochs", "1"]) == 0
    assert json.loads((model / "matryo.json").read_text())["training"]["pairs"]["rows"] == found["rows"]


def test_what_the_command_says(pairs_file, tmp_path, capsys):
    out = tmp_path / "hard.parquet"
    assert run(["mine", str(pairs_file), "--model", "toy", "--out", str(out), "--widths", "8,64"]) == 0
    first, *widths = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: ")
    assert first.endswith(" of 200 pairs, mined from 200 candidates")
    assert [line.split(";")[0] for line in widths] == ["width 8: negative", "width 64: negative_2"]
