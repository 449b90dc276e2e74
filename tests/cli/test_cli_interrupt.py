"""Ctrl-C while documents are being indexed."""

import json
import signal
import subprocess
import sys
import time

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
        [sys.executable, "-m", "matryo", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seen = 0
    while child.poll() is None:
        time.sleep(0.01)
        # It stands still while it is looked at: on a busy machine a look may take longer than the whole work.
        child.send_signal(signal.SIGSTOP)
        seen = held(index)
        if seen >= 2 * BATCH:
            break
        child.send_signal(signal.SIGCONT)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGCONT)
    said, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert said == ""
    kept = held(index)
    assert seen <= kept < DOCUMENTS
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
