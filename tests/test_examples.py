"""The examples run as they are: the loss falls, and every prefix of the trained model finds what belongs together."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from matryo import losses

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "debian")


def test_there_is_an_example_of_each():
    assert NAMES == ["lightning_module", "plain_torch", "sentence_transformers_trainer"]


# Lightning advises on data workers and on its logging interval, and imports names that torch is about to rename.
@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.parametrize("name", NAMES)
def test_example_trains_every_width(name, monkeypatch, tmp_path, capsys):
    if name.startswith("lightning"):
        pytest.importorskip("lightning", reason="the Lightning example needs the package of that name")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ran = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    values, widths = ran["losses"], ran["WIDTHS"]
    assert len(values) == 35
    assert values[-1] < values[0] / 3
    share = [ran["found"](ran["model"], width) for width in widths]
    untrained = [ran["found"](ran["new_model"](ran["anchors"] + ran["positives"]), width) for width in widths]
    assert all(after > before + 0.1 for after, before in zip(share, untrained, strict=True))
    assert share[-1] > 0.9
    assert "found by width" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_snippets_of_the_page_on_losses_run(minilm, capsys):
    page = (EXAMPLES.parent / "docs/how-to/losses.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 4
    code = "\n".join(blocks).replace("sentence-transformers/all-MiniLM-L6-v2", str(minilm))
    names = {}
    exec(compile(code, "losses.md", "exec"), names)
    assert names["values"].shape == (3,)
    assert "tensor" in capsys.readouterr().out


def test_page_on_losses_lists_every_one_and_every_example():
    page = (EXAMPLES.parent / "docs/how-to/losses.md").read_text()
    listed = set(re.findall(r"^\| `(nested_\w+)`", page, re.M))
    assert listed == {name for name in losses.__all__ if name.startswith("nested_")}
    assert set(re.findall(r"examples/(\w+)\.py", page)) == set(NAMES)
