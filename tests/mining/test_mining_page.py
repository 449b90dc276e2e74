"""The commands and the snippet of docs/how-to/hard-negatives.md, run in order on a few pairs."""

import re
import shlex
import shutil
from pathlib import Path

from matryo.cli import run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "hard-negatives.md"


def test_the_page_is_true(pairs_file, tmp_path, monkeypatch, capsys):
    shutil.copy(pairs_file, tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    commands, snippet = re.findall(r"```(?:python)?\n(.*?)```", PAGE.read_text(), re.S)
    for command in commands.strip().splitlines():
        name, *line = shlex.split(command)
        assert name == "matryo"
        assert run(line) == 0, command
    capsys.readouterr()
    exec(compile(snippet, str(PAGE), "exec"), {})
    assert "'columns': {'negative': 8, 'negative_2': 64}" in capsys.readouterr().out
