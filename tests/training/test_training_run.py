"""Whole runs: what comes out, what it depends on, and what a failing disk leaves behind."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import matryo as mt
from matryo.core.errors import DamagedError, InputError, StorageError
from matryo.core.records import read_pairs, read_retrieval
from matryo.training import StaticConfig, TrainConfig, train
from matryo.training.dev import DevEvaluator
from matryo.training.state import load_state, random_state, save_state, set_random_state
from matryo.training.static import new_static
from matryo.training.trainer import checkpoints

STATE = (".json", ".safetensors", ".txt")


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def scores(encode, dev_folder, widths=(8, 16, 32)) -> dict[int, float]:
    nesting = mt.Nesting(widths)
    return DevEvaluator(read_retrieval(dev_folder, "dev"), nesting, "nDCG@10", lambda _: encode).scores(encode)


def test_training_improves_every_width(trained, pairs_file, dev_folder):
    pairs = read_pairs(pairs_file)
    untrained = new_static(StaticConfig(width=32, vocabulary=500), [*pairs.anchors, *pairs.positives], seed=0)
    before = scores(lambda texts: untrained.encode(texts), dev_folder)
    after = scores(mt.load(trained).encoder.vectors, dev_folder)
    assert all(after[width] > before[width] + 0.02 for width in before), (before, after)


def test_folder_says_everything_about_the_model(trained, dev_folder):
    names = {path.name for path in trained.iterdir()}
    assert {"matryo.json", "README.md", "config.json", "model.safetensors", "quality_by_width.svg"} <= names
    assert "checkpoints" not in names
    assert not [path for path in trained.rglob("*") if path.name.startswith(".")]
    assert json.loads((trained / "config.json").read_text())["matryoshka_dimensions"] == [8, 16, 32]
    card = mt.load(trained).card
    assert card.nesting == mt.Nesting([8, 16, 32])
    assert sorted(card.int8_scales) == [8, 16, 32]
    assert {(row["width"], row["code"]) for row in card.scores} == {
        (width, code) for width in (8, 16, 32) for code in ("float32", "int8", "binary")
    }
    measured = scores(mt.load(trained).encoder.vectors, dev_folder)
    for row in card.scores:
        if row["code"] == "float32":
            assert row["value"] == pytest.approx(measured[row["width"]], abs=1e-5)
    assert card.training["config"]["seed"] == 0
    assert card.training["pairs"]["rows"] == 200
    assert {"matryo", "torch", "numpy", "python"} <= set(card.training["versions"])
    readme = (trained / "README.md").read_text()
    for row in card.scores:
        line = next(line for line in readme.splitlines() if line.startswith(f"| {row['width']} |"))
        assert f"{row['value']:.4f}" in line
    assert "![Quality against width](quality_by_width.svg)" in readme
    assert (trained / "quality_by_width.svg").read_text().count("<svg") == 1


def test_same_seed_same_bits_and_another_seed_another_model(config):
    for out, seed in (("one", 3), ("two", 3), ("three", 4)):
        train(config(out, seed=seed))
    one, two, three = (config(out).out for out in ("one", "two", "three"))
    assert weights(one) == weights(two)
    assert (one / "matryo.safetensors").read_bytes() == (two / "matryo.safetensors").read_bytes()
    assert weights(one) != weights(three)


def test_unnested_training_is_one_width(config):
    assert train(config(widths=(32,), max_steps=2)).nesting == mt.Nesting([32])


def test_weights_of_the_nesting_are_used(config):
    train(config("even", widths=(8, 32), max_steps=4))
    train(config("full", widths=(8, 32), weights=(0.0, 1.0), max_steps=4))
    train(config("plain", widths=(32,), max_steps=4))
    even, full, plain = (
        load_file(config(out).out / "model.safetensors")["embedding.weight"] for out in ("even", "full", "plain")
    )
    # A width of weight 0 changes nothing but the order of sums, which Adam makes visible in rows of tiny gradients.
    assert np.abs(full - plain).mean() < 0.001
    assert np.abs(even - plain).mean() > 0.05


def test_reports_every_step_losses_and_scores(config, dev_folder):
    seen = []
    train(config(dev=dev_folder), report=seen.append)
    assert [s.step for s in seen if not s.losses and not s.scores] == list(range(1, 11))
    assert {s.steps for s in seen} == {10}
    (logged,) = [s for s in seen if s.losses]
    assert sorted(logged.losses) == [8, 16, 32]
    assert [s.step for s in seen if s.scores] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("best", [8, 32, "mean", "last"])
def test_keeps_the_checkpoint_that_is_best_by_the_named_width(config, dev_folder, tmp_path, best):
    """Judged by documents that do not belong to the queries, no step is better than another but by chance."""
    dev = shutil.copytree(dev_folder, tmp_path / "wrong")
    wrong = "".join(f"q{n}\td{(n + 37) % 60}\t1\n" for n in range(60))
    (dev / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + wrong)
    seen = []
    key = best if best == "mean" else f"width_{best}"
    model = train(config(dev=dev, best=best, metric="MRR@100"), report=seen.append)
    curve = [s.scores for s in seen if s.scores]
    kept = {row["width"]: row["value"] for row in model.card.scores if row["code"] == "float32"}
    wanted = curve[-1] if best == "last" else max(curve, key=lambda s: s[key])
    assert all(kept[width] == pytest.approx(wanted[f"width_{width}"], abs=1e-5) for width in kept)
    if best != "last":
        assert wanted is not curve[-1]


def test_rows_of_one_group_are_not_negatives(config, debian_rows, tmp_path):
    """With all rows in one group nothing is left to push away: the loss is 0."""
    pairs = tmp_path / "grouped.jsonl"
    pairs.write_text("".join(json.dumps({**row, "group": "all"}) + "\n" for row in debian_rows[:200]))
    seen = []
    train(config("grouped", pairs=pairs), report=seen.append)
    losses = next(s.losses for s in seen if s.losses)
    assert losses == pytest.approx(dict.fromkeys(losses, 0.0), abs=1e-6)
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(json.dumps({**row, "group": n}) + "\n" for n, row in enumerate(debian_rows[:200])))
    train(config("alone", pairs=alone))
    train(config("plain"))
    assert weights(config("alone").out) == weights(config("plain").out)


def test_hard_negatives_are_pushed_away(config, debian_rows, tmp_path):
    losses = {}
    for columns in (0, 1, 2):
        pairs = tmp_path / f"{columns}.jsonl"
        rows = [
            row | dict.fromkeys(("negative", "negative_2")[:columns], debian_rows[(n + 7) % 200]["positive"])
            for n, row in enumerate(debian_rows[:200])
        ]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        seen = []
        train(config(str(columns), pairs=pairs), report=seen.append)
        losses[columns] = next(s.losses for s in seen if s.losses)[32]
    assert losses[0] < losses[1] < losses[2]


def test_dev_set_may_be_scored_pairs_or_pairs(config, debian_rows, tmp_path):
    sts = tmp_path / "sts.jsonl"
    rows = [
        {"sentence1": row["anchor"], "sentence2": debian_rows[n + n % 2]["positive"], "score": 1 - n % 2}
        for n, row in enumerate(debian_rows[:40])
    ]
    sts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {row["metric"] for row in train(config("sts", dev=sts)).card.scores} == {"Spearman"}
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps(row) + "\n" for row in debian_rows[:40]))
    assert {row["metric"] for row in train(config("pairs", dev=dev)).card.scores} == {"nDCG@10"}


def test_checkpoints_hold_no_pickle_and_are_whole(interrupted):
    found = checkpoints(interrupted().out / "checkpoints")
    assert [path.name for path in found] == ["checkpoint-2", "checkpoint-4"]
    work = found[0].parent
    files = [path for path in work.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= set(STATE)
    assert not [path for path in work.iterdir() if path.name.startswith(".")]
    for path in found:
        assert load_state(path, "optimizer")["state"][0]["step"] == int(path.name.rpartition("-")[2])
        mt.load(path)


def test_state_round_trip(tmp_path):
    state = {"a": [1, 2.5, None, "x", True], 3: {"t": torch.arange(4)}, "empty": {}, "none": torch.zeros(0, 2)}
    save_state(tmp_path, "state", state)
    back = load_state(tmp_path, "state")
    assert back["a"] == state["a"]
    assert torch.equal(back[3]["t"], state[3]["t"])
    assert back["none"].shape == (0, 2)
    before = random_state()
    save_state(tmp_path, "random", before)
    drawn = (torch.rand(3), np.random.random(3))  # noqa: NPY002 - the state the trainer draws from
    set_random_state(load_state(tmp_path, "random"))
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.random(3), drawn[1])  # noqa: NPY002


def break_rename(monkeypatch):
    real = os.replace

    def replace(source, target):
        if str(target).endswith("checkpoint-4"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def break_sync(monkeypatch):
    real = os.fsync
    calls = []

    def fsync(handle):
        calls.append(handle)
        if "checkpoint-4" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def break_tensors(monkeypatch):
    """safetensors reports a full disk by an error of its own."""
    from safetensors import SafetensorError

    from matryo.training import state

    real = state.save_file

    def save(tensors, path):
        if "checkpoint-4" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(state, "save_file", save)


@pytest.mark.parametrize("broken", [break_rename, break_sync, break_tensors])
def test_failing_disk_keeps_earlier_checkpoints_and_the_run_goes_on(config, broken):
    with pytest.MonkeyPatch.context() as monkeypatch:
        broken(monkeypatch)
        with pytest.raises(StorageError, match="nothing that was saved before is lost") as caught:
            train(config())
    assert "checkpoint-4" in str(caught.value)
    work = config().out / "checkpoints"
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-2", "run.json"]
    train(config(), resume=True)
    train(config("whole"))
    assert weights(config().out) == weights(config("whole").out)


def test_failing_disk_at_the_end_keeps_the_run(config, monkeypatch):
    from matryo.training import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_card", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(StorageError, match="No space left"):
            train(config())
    assert not (config().out / "matryo.json").exists()
    train(config(), resume=True)
    train(config("whole"))
    assert weights(config().out) == weights(config("whole").out)
    assert not (config().out / "checkpoints").exists()


def test_resume_after_an_exception_gives_the_same_bits(interrupted, config, dev_folder):
    made = interrupted(dev=dev_folder)
    again = train(made, resume=True)
    whole = train(config("whole", dev=dev_folder))
    assert weights(made.out) == weights(config("whole").out)
    assert again.card.scores == whole.card.scores
    before = (made.out / "matryo.json").read_bytes()
    assert train(made, resume=True).card.scores == whole.card.scores, "a finished run is loaded"
    assert (made.out / "matryo.json").read_bytes() == before


def test_damaged_checkpoint_is_a_typed_error(interrupted):
    made = interrupted()
    newest = made.out / "checkpoints" / "checkpoint-4"
    (newest / "optimizer.safetensors").write_bytes(b"12345678")
    with pytest.raises(DamagedError, match="checkpoint-4 cannot be read"):
        train(made, resume=True)
    shutil.rmtree(newest)
    train(made, resume=True)
    (made.out / "matryo.json").unlink()


def test_damaged_run_record_is_a_typed_error(interrupted):
    made = interrupted()
    (made.out / "checkpoints" / "run.json").write_text("{")
    with pytest.raises(DamagedError, match=r"run\.json cannot be read"):
        train(made, resume=True)


def test_diverging_loss_names_row_or_width(config, tmp_path):
    static = StaticConfig(width=32, vocabulary=500)
    with pytest.raises(InputError, match="lower the learning rate"):
        train(config(static=static, learning_rate=1e38))


def test_fine_tunes_a_transformer(minilm, debian_rows, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    short = [{"anchor": row["anchor"], "positive": row["positive"][:80]} for row in debian_rows[:32]]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in short))
    out = tmp_path / "tuned"
    made = TrainConfig(
        pairs=pairs, out=out, base=str(minilm), widths=(64, 384), batch_size=8, max_steps=2, device="cpu"
    )
    model = train(made)
    assert model.nesting == mt.Nesting([64, 384])
    assert json.loads((out / "config.json").read_text())["matryoshka_dimensions"] == [64, 384]
    assert not (out / "checkpoints").exists()
    rows = mt.load(out, device="cpu").encode(["mail server"], width=64)
    assert np.linalg.norm(rows) == pytest.approx(1, abs=1e-5)
    assert not np.array_equal(rows, mt.load(minilm, device="cpu").encode(["mail server"], width=64))


def test_hostile_base_is_refused_before_anything_is_written(config, trained, tmp_path):
    hostile = shutil.copytree(trained, tmp_path / "hostile")
    (hostile / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "planted.Module"}]')
    with pytest.raises(InputError, match=r"names the class 'planted\.Module'"):
        train(config(base=str(hostile)))
    assert not config().out.exists()


def test_static_base_can_be_trained_on(config, trained):
    model = train(config(base=str(trained), max_steps=2))
    assert model.encoder.table.shape == mt.load(trained).encoder.table.shape
    assert not np.array_equal(model.encoder.table, mt.load(trained).encoder.table)


def test_whoever_may_read_one_file_of_a_model_may_read_them_all(trained):
    modes = {path.name: path.stat().st_mode for path in trained.iterdir() if path.is_file()}
    assert len(set(modes.values())) == 1, modes
