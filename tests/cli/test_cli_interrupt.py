"""Ctrl-C while documents are being indexed."""

import json
import subprocess
import sys

import pytest

from matryo.cli import run
from matryo.cli.documents import BATCH
from matryo.core.errors import MatryoError
from matryo.index import Index

DOCUMENTS = 20 * BATCH + 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "corpus.jsonl"
    with path.open("w") as stream:
        for n in range(DOCUMENTS):
            stream.write(json.dumps({"_id": f"d{n}", "text": f"text number {n} " + "and more " * 40}) + "\n")
    return path


INTERRUPTED = """
import os, signal, sys, threading
from matryo.cli import main
from matryo.index.writer import Writer

whole, batches = Writer.upsert, []

def upsert(*given):
    batches.append(given)
    if len(batches) == 3:
        threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGINT)).start()
    return whole(*given)

Writer.upsert = upsert
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
"""The command line, which gets a Ctrl-C some milliseconds after its third batch has begun. It comes from inside: on a
busy machine whoever watches from outside may see nothing before the work is done. It is listened to even where the
tests run in the background of a shell, which has its children ignore it."""


def held(folder):
    """How many documents a reader sees now; 0 where the index is not there yet."""
    try:
        with Index.open(folder, read_only=True) as index:
            return len(index)
    except MatryoError:
        return 0


def test_ctrl_c_keeps_whole_batches_and_the_rest_can_follow(corpus, tmp_path, capsys):
    index = tmp_path / "docs.matryo"
    line = ["index", "build", str(corpus), "--model", "toy", "--out", str(index)]
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert said == ""
    kept = held(index)
    assert 2 * BATCH <= kept < DOCUMENTS
    assert kept % BATCH == 0
    assert err == (
        f"matryo: interrupted; {index} holds {kept} documents, in whole batches; the rest can follow by "
        "the same command with --resume\n"
    )
    assert run(["index", "check", str(index)]) == 0

    # By the stated rule: building again is refused, adding brings the rest, the whole is what it would have been.
    capsys.readouterr()
    assert run(line) == 2
    assert "already holds an index" in capsys.readouterr().err
    assert held(index) == kept
    assert run(["index", "add", str(index), str(corpus)]) == 0
    assert run(["index", "compact", str(index)]) == 0
    with Index.open(index) as opened:
        assert len(opened) == DOCUMENTS
        assert opened.check().ok
    capsys.readouterr()
    assert run(["search", str(index), f"text number {DOCUMENTS - 1}", "-k", "1", "--json"]) == 0
    hit = json.loads(capsys.readouterr().out)["queries"][0]["hits"][0]
    assert hit["document"].startswith("text number ")
