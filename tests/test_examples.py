"""The examples run as they are: the loss falls, and every prefix of the trained model finds what belongs together."""

import runpy
from pathlib import Path

import pytest
import torch

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
    losses, widths = ran["losses"], ran["WIDTHS"]
    assert len(losses) == 35
    assert losses[-1] < losses[0] / 3
    share = [ran["found"](ran["model"], width) for width in widths]
    untrained = [ran["found"](ran["new_model"](ran["anchors"] + ran["positives"]), width) for width in widths]
    assert all(after > before + 0.1 for after, before in zip(share, untrained, strict=True))
    assert share[-1] > 0.9
    assert "found by width" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
