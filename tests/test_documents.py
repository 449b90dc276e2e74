"""What the documents say is true: the README's snippet runs, the change log has the package's version."""

import gzip
import re
from pathlib import Path

import matryo
from matryo.demo import DATA

ROOT = Path(__file__).parents[1]


def test_readme_snippet_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    with gzip.open(DATA / "train.jsonl.gz", "rt") as stream:
        (tmp_path / "pairs.jsonl").write_text("".join(next(stream) for _ in range(300)))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["vectors"].shape == (2, 32)
    assert capsys.readouterr().out.startswith("[['one']]")


def test_readme_lists_every_room():
    rooms = {p.name for p in (ROOT / "src/matryo").iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    listed = set(re.findall(r"\b([a-z]+)/", re.search(r"```\n(cli/.*?)```", (ROOT / "README.md").read_text(), re.S)[1]))
    assert listed == rooms


def test_changelog_is_of_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == matryo.__version__


def test_front_door_is_what_it_says():
    for name in matryo.__all__:
        assert getattr(matryo, name) is not None
    assert set(dir(matryo)) == set(matryo.__all__)
