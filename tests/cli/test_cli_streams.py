"""`matryo index build` from vectors in files: streamed, cut off by kill -9, gone on with."""

import json
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from matryo.cli import documents, run
from matryo.cli.documents import Documents
from matryo.index import Index

ITEMS = 1000
BASE = np.random.default_rng(0).standard_normal((ITEMS, 32)).astype(np.float32)

KILLED = """
import os, signal, sys
from matryo.cli import documents, run
from matryo.index.writer import Writer

documents.BATCH, documents.READY_BYTES = 100, 1
left, real = int(sys.argv[1]), Writer.upsert

def counted(*args, **kwargs):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

Writer.upsert = counted
sys.exit(run(sys.argv[2:]))
"""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(documents, "BATCH", 100)
    monkeypatch.setattr(documents, "READY_BYTES", 1)


@pytest.fixture
def files(tmp_path):
    """The same items in every form that build reads."""
    rows = [{"id": f"d{n}", "text": f"text {n}", "part": n % 3} for n in range(ITEMS)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "v.npy", BASE)
    save_file({"v": BASE}, tmp_path / "v.safetensors")
    table = {name: [row[name] for row in rows] for name in rows[0]} | {"vector": list(BASE)}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "docs.parquet", row_group_size=300)
    bare = {"_id": table["id"], "vector": list(BASE.astype(np.float16))}
    pyarrow.parquet.write_table(pyarrow.table(bare), tmp_path / "bare.parquet")
    return tmp_path


def test_every_form_gives_the_same_index(files, small, capsys):
    beside = ["--vectors", files / "v.npy"]
    forms = {
        "npy": [files / "v.npy"],
        "safetensors": [files / "v.safetensors"],
        "beside": [files / "docs.jsonl", *beside, "--metadata", "part"],
        "parquet": [files / "docs.parquet", "--metadata", "part"],
        "bare": [files / "bare.parquet"],
        "both": [files / "docs.parquet", *beside],
    }
    for name, arguments in forms.items():
        out = files / f"{name}.matryo"
        assert run(["index", "build", *map(str, arguments), "--out", str(out)]) == 0, capsys.readouterr().err
        with Index.open(out) as index:
            hits = index.search(BASE[[3, 977]], k=1, plan="32:float32")
            rows = ["3", "977"] if name in ("npy", "safetensors") else ["d3", "d977"]
            assert (len(index), [ids[0] for ids in hits.ids]) == (ITEMS, rows)
            text = {"npy": None, "safetensors": None, "bare": ""}.get(name, "text 977")
            assert hits.documents[1] == [text]
            assert hits.metadata[1] == [{"part": 2} if "--metadata" in arguments else None]
            assert index.stats()["commits"] == 10
            assert index.check().ok


@pytest.mark.parametrize("form", ["docs.parquet", "v.npy", "encoded"])
def test_a_killed_build_goes_on_after_its_last_batch(files, small, python, capsys, form):
    out = files / "i.matryo"
    line = ["index", "build", str(files / form), "--out", str(out)]
    if form == "encoded":
        line = ["index", "build", str(files / "docs.jsonl"), "--model", "toy", "--out", str(out)]
    assert python("-c", KILLED, 4, *line).returncode == -9
    with Index.open(out, read_only=True) as index:
        assert len(index) == 400
    assert run(line) == 2
    assert "already holds an index" in capsys.readouterr().err
    assert python("-c", KILLED, 3, *line, "--resume").returncode == -9
    assert run([*line, "--resume"]) == 0
    with Index.open(out, read_only=True) as index:
        assert (len(index), index.stats()["commits"], index.stats()["dead_rows"]) == (ITEMS, 10, 0)
        assert index.check().ok
    assert run([*line, "--resume"]) == 0, "nothing is left to do"
    with Index.open(out, read_only=True) as index:
        assert index.stats()["commits"] == 10


def test_going_on_with_something_else_is_refused(files, small, python, capsys):
    out, line = files / "i.matryo", ["index", "build", str(files / "v.npy"), "--out", str(files / "i.matryo")]
    assert python("-c", KILLED, 4, *line).returncode == -9

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert run([*arguments, "--resume"]) == 2
        with Index.open(out, read_only=True) as index:
            assert len(index) == 400
        return capsys.readouterr().err

    other = BASE.copy()
    other[5, 5] += 1
    np.save(files / "other.npy", other)
    said = refused("index", "build", str(files / "other.npy"), "--out", str(out))
    assert "was begun from another source; go on with that one, or build a new index from this one" in said
    assert "was begun with store float16, not float32" in refused(*line, "--store", "float32")
    assert "was begun with plan" in refused(*line, "--plan", "16:float32 keep 9 > 32:float32")
    assert "made for another model" in refused(
        "index", "build", str(files / "docs.jsonl"), "--model", "toy", "--out", str(out)
    )
    with Index.create(files / "mine.matryo", width=32) as index:
        index.upsert(["mine"], BASE[:1])
    assert run(["index", "build", str(files / "v.npy"), "--out", str(files / "mine.matryo"), "--resume"]) == 2
    assert "was begun from another source" in capsys.readouterr().err


def test_what_is_wrong_far_down_is_found_before_anything_is_written(files, small, capsys):
    broken = BASE.copy()
    broken[950] = 0
    np.save(files / "zero.npy", broken)
    rows = [json.loads(line) for line in (files / "docs.jsonl").read_text().splitlines()]
    rows[998]["id"] = "d17"
    (files / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments, says in (
        ([files / "zero.npy"], "row 950 is all zeros"),
        ([files / "twice.jsonl", "--vectors", files / "v.npy"], "id 'd17' appears twice; ids must be distinct"),
        ([files / "v.npy", "--metadata", "part"], "holds vectors and nothing else"),
        ([files / "v.npy", "--model", "toy"], "holds vectors and nothing else"),
        ([files / "docs.parquet", "--model", "toy", "--vectors", files / "v.npy"], "one of the two"),
    ):
        assert run(["index", "build", *map(str, arguments), "--out", str(files / "new.matryo")]) == 2
        assert says in capsys.readouterr().err
        assert not (files / "new.matryo").exists()


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "READY_BYTES", 1 << 20)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "v.npy", rng.standard_normal((200_000, 64), dtype=np.float32))  # 51 MB, in batches of 1 MB
    given = Documents(tmp_path / "v.npy", tmp_path / "v.npy", [], None)
    tracemalloc.start()
    try:
        given.check(lambda _: None)
        rows = sum(len(batch.ids) for batch, _ in given.batches(lambda _: None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 200_000
    assert peak < 12 << 20
