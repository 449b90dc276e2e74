"""What is refused, and in which words; a full disk, a kill, a Ctrl-C; parts that are finished stay."""

import json
import os
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from matryo.bulk import Bulk, Ray, check, embed
from matryo.cli import run
from matryo.core.errors import InputError, MissingExtraError, UnavailableError


def refused(inputs, out, options=None, model="toy", **more):
    with pytest.raises(InputError) as caught:
        embed(model, inputs, out, options, **more)
    return str(caught.value)


def test_columns_that_are_not_there_or_not_text(write, tmp_path):
    path, out = write("a.parquet", {"body": ["x"], "number": [1]}), tmp_path / "v"
    assert refused([path], out) == f"{path}: no column 'text'; it has 'body', 'number'"
    assert (
        refused([path], out, Bulk(columns=("title", "body"))) == f"{path}: no column 'title'; it has 'body', 'number'"
    )
    assert "column 'number' must be text, it is int64" in refused([path], out, Bulk(columns=("number",)))
    assert "no column 'id' to keep; it has 'body', 'number'" in refused(
        [path], out, Bulk(columns=("body",), keep=("id",))
    )
    assert not out.exists()


def test_files_that_cannot_be_read(write, tmp_path):
    good, out = write("a.parquet", {"text": ["x"]}), tmp_path / "v"
    garbage, table = tmp_path / "g.parquet", tmp_path / "t.csv"
    garbage.write_bytes(b"no parquet at all")
    table.write_text("text\nx\n")
    (tmp_path / "empty").mkdir()
    assert f"{garbage}: not a readable Parquet file" in refused([good, garbage], out)
    assert "bulk encoding reads Parquet" in refused([table], out)
    assert f"no such file: {tmp_path / 'none.parquet'}" in refused([tmp_path / "none.parquet"], out)
    assert "no *.parquet in this folder" in refused([tmp_path / "empty"], out)
    assert f"{good} is given twice" in refused([good, good.parent], out)
    assert "no input" in refused([], out)
    assert "no rows, nothing to encode" in refused(
        [write("n.parquet", {"text": pyarrow.array([], pyarrow.string())})], out
    )
    assert not out.exists()


def test_a_page_that_is_damaged_is_named_and_the_parts_before_stay(write, tmp_path):
    path, out = write("a.parquet", {"text": [f"text number {n}" for n in range(300)]}, group=100), tmp_path / "v"
    first = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = first.dictionary_page_offset or first.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert f"{path} row groups 1 to 1: not readable" in refused([path], out, Bulk(part_rows=100))
    assert [part.name for part in out.glob("*.parquet")] == ["part-00000-00000.parquet"]
    assert not list(out.glob(".*"))


def test_text_that_is_not_unicode_is_named(write, tmp_path):
    array = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    path = write("a.parquet", {"text": array})
    assert f"{path} rows 0 to 1: text that is not UTF-8" in refused([path], tmp_path / "v")


def test_folders_that_hold_something_else(corpus, tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("mine")
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    assert f"{file} is a file; choose a folder" in refused([corpus], file)
    assert f"{other} is not empty and not a bulk encoding" in refused([corpus], other)
    assert (other / "letter.txt").read_text() == "mine"
    (other / "job.json").write_text("[]")
    with pytest.raises(Exception, match="is not of format 1"):
        embed("toy", [corpus], other)


def test_options_that_are_refused(trained, corpus, tmp_path):
    out = tmp_path / "v"
    assert "unknown code 'pq8'; bulk encoding writes float32" in refused_options(code="pq8")
    assert "bad must be refuse or skip, got 'no'" in refused_options(bad="no")
    assert "part_rows must be a whole number above 0, got 0" in refused_options(part_rows=0)
    assert "columns names a column twice: a, a" in refused_options(columns=("a", "a"))
    assert "keep cannot copy a column 'vector'" in refused_options(keep=("vector",))
    assert "width 65 is outside 1..64" in refused([corpus], out, Bulk(width=65))
    assert "binary codes need a width that is a multiple of 8, got 12" in refused(
        [corpus], out, Bulk(width=12, code="binary")
    )
    assert "no int8 ranges for width 9" in refused([corpus], out, Bulk(width=9, code="int8"), model=trained)
    with pytest.raises(InputError, match="workers must be 1 or more, got 0"):
        Ray(address="local", workers=0)
    with pytest.raises(InputError, match="a worker needs processors or GPUs"):
        Ray(address="local", cpus=0)
    assert not out.exists()


def refused_options(**options):
    with pytest.raises(InputError) as caught:
        Bulk(**options)
    return str(caught.value)


def test_a_text_that_the_model_cannot_encode(trained, write, tmp_path):
    """A static model gives zeros for a text without a token, such as a space of no width."""
    texts = ["mail server", "\u200b", "a game", None, "\u200b \u200b", "editor"]
    path = write("a.parquet", {"text": texts})
    said = refused([path], tmp_path / "v", model=trained)
    assert f"{path} row 1 (from 0): the model gave only zeros" in said
    assert "--bad skip" in said
    found = embed(trained, [path], tmp_path / "v", Bulk(bad="skip"))
    assert (found["rows"], found["left_out"], found["parts"][0]["rows_left_out"]) == (3, 3, [1, 3, 4])
    table = pyarrow.parquet.read_table(tmp_path / "v" / "part-00000-00000.parquet")
    assert table.column("row").to_pylist() == [0, 2, 5]
    assert np.isfinite(np.stack(table.column("vector").to_pylist())).all()


FULL_DISK = """
import resource, signal, sys
import matryo.bulk, numpy, pyarrow.parquet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from matryo.cli import run
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [300, 20_000])
def test_a_full_disk_is_said_and_what_is_finished_stays(python, corpus, tmp_path, files_of, limit):
    """Without room for the job, or for the larger parts, whose turn comes first."""
    out = tmp_path / "v"
    line = ["embed", "toy", corpus, "--part-rows", 100, "--out"]
    ran = python("-c", FULL_DISK, limit, *line, out)
    assert ran.returncode == 2, ran.stderr
    assert "nothing that was saved before is lost" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (out / "manifest.json").exists()
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.suffix == ".parquet"]
    assert run([str(word) for word in [*line, out]]) == 0
    assert run([str(word) for word in [*line, tmp_path / "whole"]]) == 0
    assert files_of(out) == files_of(tmp_path / "whole")


KILLED = """
import os, sys
import pyarrow.parquet
from matryo.cli import run
written = []

class Writer(pyarrow.parquet.ParquetWriter):
    def write_table(self, *rest, **more):
        super().write_table(*rest, **more)
        written.append(1)
        if len(written) == int(limit):
            os._exit(9)

limit = sys.argv[1]
pyarrow.parquet.ParquetWriter = Writer
sys.exit(run(sys.argv[2:]))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(python, corpus, tmp_path, files_of):
    out, whole = tmp_path / "v", tmp_path / "whole"
    line = ["embed", "toy", corpus, "--part-rows", 50, "--out"]
    for kill, there in ((1, 0), (3, 2)):
        assert python("-c", KILLED, kill, *line, out).returncode == 9
        assert len(list(out.glob("part-*.parquet"))) == there
    assert len(list(out.glob(".*.tmp"))) == 2
    assert run([str(word) for word in [*line, out]]) == 0
    assert run([str(word) for word in [*line, whole]]) == 0
    assert files_of(out) == files_of(whole)
    assert check(out)["read"] == 400


def test_ctrl_c_says_how_far_it_came(corpus, tmp_path, capsys, monkeypatch):
    from matryo.bulk import run as running

    made, whole = [], running.encode_part

    def stop(*given):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(given)
        return whole(*given)

    line = ["embed", "toy", str(corpus), "--out", str(tmp_path / "v"), "--part-rows", "100"]
    monkeypatch.setattr(running, "encode_part", stop)
    assert run(line) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["part 1/4: 120 of 400 rows", "part 2/4: 240 of 400 rows"]
    assert said[-1] == f"matryo: interrupted; 2 of 4 parts are in {tmp_path / 'v'}; go on with the same command"
    monkeypatch.undo()
    assert run([*line, "--json"]) == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert answer == {
        "out": str(tmp_path / "v"), "parts": 4, "width": 64, "code": "float32",
        "read": 400, "rows": 385, "left_out": 15,
        "bytes": sum(path.stat().st_size for path in (tmp_path / "v").glob("*.parquet")),
        "checksum": check(tmp_path / "v")["checksum"],
    }  # fmt: skip
    assert "left out, as there is nothing to encode: 15 rows" not in told.err


def test_long_runs_tell_of_every_hundredth(write, tmp_path, capsys):
    path = write("a.parquet", {"text": ["word"] * 150}, group=1)
    assert run(["embed", "toy", str(path), "--out", str(tmp_path / "v"), "--part-rows", "1"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("part ")]
    assert len(told) == 100
    assert told[-1].startswith("part 150/150: 150 of 150 rows")


def test_clusters_that_are_not_there(corpus, tmp_path, capsys, monkeypatch):
    line = ["embed", "toy", str(corpus), "--out", str(tmp_path / "v")]
    assert run([*line, "--workers", "2"]) == 2
    assert "--workers is for a cluster; give --ray too, such as --ray local" in capsys.readouterr().err
    with pytest.raises(UnavailableError, match=r"nobody listens at the Ray address 127.0.0.1:1 .*ray start --head"):
        embed("toy", [corpus], tmp_path / "v", ray=Ray(address="127.0.0.1:1"))
    with pytest.raises(InputError, match="a Ray address is local, auto, HOST:PORT or ray://HOST:PORT, got 'cluster'"):
        embed("toy", [corpus], tmp_path / "v", ray=Ray(address="cluster"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'matryo\[ray\]'"):
        embed("toy", [corpus], tmp_path / "v", ray=Ray(address="local"))
    assert not os.path.exists(tmp_path / "v")
