"""Batches without duplicates, early stopping, adapters and gradient caching, through whole runs."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from torch import nn

import matryo as mt
from matryo.core.errors import InputError, MissingExtraError
from matryo.core.prefix import Nesting
from matryo.losses import nested_quantised_info_nce
from matryo.training import DataConfig, LoraConfig, TrainConfig, train
from matryo.training.data import Rows, WithoutDuplicates, batches_by_label, token_datasets
from matryo.training.objective import Batch, NestedObjective, Part
from matryo.training.progress import ran_out
from matryo.training.row_adam import RowAdam
from matryo.training.static import train_tokenizer
from matryo.training.trainer import checkpoints

REPEATED = [("mail", "a server"), ("a server", "letters"), ("mail", "post"), ("game", "chess"), ("chess", "board")]


@pytest.mark.parametrize("numbers", [True, False])
def test_no_text_is_twice_in_a_batch_whether_rows_are_texts_or_numbers(numbers):
    pairs = REPEATED * 4 + [(f"text {n}", f"other {n}") for n in range(20)]
    columns = {"anchor": [a for a, _ in pairs], "positive": [p for _, p in pairs]}
    rows = Rows("pairs", DataConfig(path="pairs"), columns, labels=np.zeros(len(pairs), int))
    dataset = Dataset.from_dict({**columns, "label": rows.labels})
    if numbers:
        tokenizer = train_tokenizer([text for pair in pairs for text in pair], 100)
        dataset, _ = token_datasets([rows], tokenizer)
        assert dataset[0]["anchor"] == dataset[5]["anchor"] == dataset[2]["anchor"] != dataset[3]["anchor"]
    options = {"batch_size": 8, "drop_last": False, "generator": torch.Generator(), "seed": 0}
    batches = list(WithoutDuplicates(dataset, **options))
    for batch in batches:
        texts = [text for n in batch for text in pairs[n]]
        assert len(set(texts)) == len(texts)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(pairs)))


def test_rows_of_one_text_left_over_are_no_batches_of_one():
    columns = {"anchor": ["mail"] * 6 + ["game", "chess"], "positive": [f"text {n}" for n in range(8)]}
    batches = list(WithoutDuplicates(Dataset.from_dict(columns), batch_size=4, drop_last=False, seed=0))
    assert batches
    assert all(len(batch) > 1 for batch in batches)


@pytest.mark.parametrize("options", [{}, {"loss": "sigmoid"}, {"no_duplicates": True}])
def test_a_last_row_with_nothing_to_be_compared_with_is_left_out(config, tmp_path, options):
    """33 pairs in batches of 16: the last would be one, which these losses refuse."""
    pairs, seen = tmp_path / "33.jsonl", []
    pairs.write_text("".join(f'{{"anchor": "word{n} here", "positive": "word{n} there"}}\n' for n in range(33)))
    train(config(pairs=pairs, batch_size=16, save_steps=None, **options), report=seen.append)
    assert seen[-1].step == seen[-1].steps == 4


def test_batches_by_label_hold_two_of_a_class():
    labels = [0] * 9 + [1] * 6 + [2] * 3 + [3]
    dataset = Dataset.from_dict({"text": [str(n) for n in range(19)], "label": labels})
    options = {"batch_size": 6, "drop_last": False, "valid_label_columns": ["label"]}
    for batch in batches_by_label(dataset, **options, generator=torch.Generator(), seed=0):
        found = [labels[n] for n in batch]
        assert len(set(found)) >= 2
        assert all(found.count(label) >= 2 for label in found)


def test_duplicates_are_negatives_unless_they_are_kept_apart(config, tmp_path):
    """Every anchor is the positive of another row: only kept apart can such rows be told from each other."""
    file = tmp_path / "repeated.jsonl"
    words = [f"w{n} x{n} y{n}" for n in range(40)]
    rows = [{"anchor": a, "positive": a} for a in words for _ in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for apart in (False, True):
        seen = []
        train(config(str(apart), pairs=file, no_duplicates=apart, epochs=4, save_steps=None), report=seen.append)
        losses[apart] = [s.losses for s in seen if s.losses][-1][32]
    assert losses[True] < 0.2 < losses[False]


def test_patience():
    def history(*scores):
        return [{"loss": 1.0}, *({"eval_width_8": score, "eval_mean": 0.0} for score in scores)]

    assert not ran_out(history(), "width_8", 1)
    assert not ran_out(history(0.3, 0.2), "width_8", 2)
    assert ran_out(history(0.3, 0.2, 0.3), "width_8", 2), "equal is not better"
    assert not ran_out(history(0.3, 0.2, 0.4), "width_8", 2)
    assert ran_out(history(0.3, 0.2, 0.4), "mean", 2)
    assert not ran_out(history(0.3, 0.2, 0.1), "width_8", None)


def test_run_stops_early_at_the_chosen_width_and_a_resumed_one_stops_there_too(config, dev_folder, monkeypatch):
    from matryo.training.dev import DevEvaluator

    real = DevEvaluator.scores
    curve = {2: 0.3, 4: 0.6, 6: 0.5, 8: 0.4, 10: 0.9}

    def scores(self, encode):
        return dict.fromkeys(real(self, encode), 0.0) | {16: curve.get(self.step, 0.0)}

    call = DevEvaluator.__call__
    monkeypatch.setattr(DevEvaluator, "scores", scores)
    monkeypatch.setattr(
        DevEvaluator,
        "__call__",
        lambda self, model, *a, epoch=-1, steps=-1, **k: setattr(self, "step", steps) or call(self, model, *a, **k),
    )
    options = {"dev": dev_folder, "best": 16, "patience": 2}
    seen = []
    model = train(config(**options), report=seen.append)
    assert max(step.step for step in seen) == 8
    assert model.card.training["steps"] == 8

    class StoppedError(Exception):
        pass

    def stop(step):
        if step.scores and step.step == 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config("again", **options), report=stop)
    train(config("again", **options), resume=True)
    one, two = ((config(name, **options).out / "model.safetensors").read_bytes() for name in ("model", "again"))
    assert one == two

    from matryo.training import run

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config("third", **options))
    assert checkpoints(config("third").out / "checkpoints")[-1].name == "checkpoint-8"
    seen.clear()
    model = train(config("third", **options), resume=True, report=seen.append)
    assert not seen, "it had stopped before it was interrupted"
    assert model.card.training["steps"] == 8
    assert (config("third").out / "model.safetensors").read_bytes() == one


@pytest.fixture(scope="session")
def short_pairs(debian_rows, tmp_path_factory):
    file = tmp_path_factory.mktemp("short") / "pairs.jsonl"
    rows = [{"anchor": row["anchor"], "positive": row["positive"][:60]} for row in debian_rows[:24]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tune(minilm, pairs, out, **options):
    small = {"widths": (64, 384), "batch_size": 12, "max_steps": 2, "device": "cpu"}
    return TrainConfig(**{"pairs": pairs, "out": out, "base": str(minilm), **small, **options})


def test_adapters_of_a_turned_model_are_merged_with_its_axes(minilm, short_pairs, tmp_path):
    options = {"lora": LoraConfig(r=4, target_modules=("query", "value")), "rotate": "pca", "learning_rate": 1e-9}
    tuned = train(tune(minilm, short_pairs, tmp_path / "tuned", **options, epochs=1))
    turned = train(tune(minilm, short_pairs, tmp_path / "turned", rotate="pca", epochs=0))
    texts = ["mail server", "a puzzle game"]
    np.testing.assert_allclose(tuned.encode(texts), turned.encode(texts), atol=1e-4)


def test_adapters_are_merged_into_a_folder_that_loads_anywhere(minilm, short_pairs, tmp_path):
    options = {"lora": LoraConfig(r=4, target_modules=("query", "value")), "learning_rate": 1e-2, "epochs": 2}
    made = tune(minilm, short_pairs, tmp_path / "tuned", **options)
    model = train(made)
    before, after = load_file(minilm / "model.safetensors"), load_file(made.out / "model.safetensors")
    shared = before.keys() & after.keys()
    changed = {name for name in shared if not np.allclose(before[name], after[name])}
    assert len(shared) == len(after)
    assert changed
    assert all(".query.weight" in name or ".value.weight" in name for name in changed)
    texts = ["mail server", "a puzzle game"]
    plain = SentenceTransformer(str(made.out), device="cpu").encode(texts)
    np.testing.assert_allclose(mt.load(made.out, device="cpu").encoder.vectors(texts), plain, atol=1e-6)
    np.testing.assert_allclose(model.encoder.vectors(texts), plain, atol=1e-6)

    def stop(step):
        if step.step == 2:
            raise InterruptedError

    again = tune(minilm, short_pairs, tmp_path / "again", **options, save_steps=1)
    with pytest.raises(InterruptedError):
        train(again, report=stop)
    kept = checkpoints(again.out / "checkpoints")
    assert [path.name for path in kept] == ["checkpoint-1"]
    assert (kept[0] / "adapter_model.safetensors").stat().st_size < 1e6, "a checkpoint holds the adapters alone"
    train(again, resume=True)
    assert (again.out / "model.safetensors").read_bytes() == (made.out / "model.safetensors").read_bytes()


def test_adapters_that_cannot_be(minilm, short_pairs, trained, tmp_path, monkeypatch):
    out = tmp_path / "tuned"
    with pytest.raises(InputError, match=r"lora: .*name layers of the model in target_modules"):
        train(tune(minilm, short_pairs, out, lora={"target_modules": ["nothing"]}))
    with pytest.raises(InputError, match="lora adapts a transformer, and this model has none"):
        train(TrainConfig(pairs=short_pairs, out=out, base=str(trained), lora=4))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"lora needs peft.*pip install 'matryo\[lora\]'"):
        train(tune(minilm, short_pairs, out, lora=4))
    assert not out.exists()


def test_cached_batches_have_the_gradient_of_the_whole_batch(minilm, short_pairs):
    """Without dropout, whose masks belong to a mini-batch."""
    texts = [json.loads(line) for line in short_pairs.read_text().splitlines()]
    nesting = Nesting([64, 384])
    gradients = []
    for size in (None, 5):
        model = SentenceTransformer(str(minilm), device="cpu").eval()
        objective = NestedObjective(model, nesting, {"a": Part("info_nce", {}, nesting)}, mini_batch_size=size)
        columns = [model.preprocess([row[name] for row in texts[:12]]) for name in ("anchor", "positive")]
        objective(columns, None)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


def test_transformer_with_a_head_in_mini_batches(minilm, debian_rows, tmp_path):
    file = tmp_path / "labelled.jsonl"
    rows = [{"text": row["anchor"][:40], "label": n % 2} for n, row in enumerate(debian_rows[:24])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tune(minilm, file, tmp_path / "tuned", loss="cross_entropy", mini_batch_size=5)
    model = train(made)
    assert (made.out / "head.safetensors").is_file()
    assert model.card.training["classes"] == {"labelled": ["0", "1"]}


def test_teacher_of_a_transformer(minilm, short_pairs, trained, tmp_path):
    made = tune(
        minilm, short_pairs, tmp_path / "tuned", loss="distill", loss_args={"kind": "similarity"}, teacher="toy"
    )
    assert train(made).nesting == Nesting([64, 384])


def test_row_adam_updates_dense_gradients_as_adam_does():
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = RowAdam([ours], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    for step in range(5):
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            ((weight - step) ** 2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_batch_that_compares_nothing_changes_nothing():
    part = Part("cosent", {}, Nesting([2, 4]))
    rows = torch.randn(3, 4, requires_grad=True)
    total, values = part(Batch([rows, rows.flip(0)], torch.ones(3)), Nesting([2, 4]))
    total.backward()
    assert total == 0
    assert values.tolist() == [0, 0]
    assert rows.grad.abs().sum() == 0


def test_learned_arguments_stay_positive_and_get_a_gradient():
    nesting = Nesting([2, 4])
    part = Part("info_nce", {"temperature": [0.1, 0.2], "learn": ["temperature"]}, nesting)
    assert part.learned_values() == {"temperature": pytest.approx([0.1, 0.2])}
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    total, _ = part(Batch([rows, rows.flip(0)]), nesting)
    total.backward()
    assert (part.learned["temperature"].grad != 0).all()
    part.zero_grad()
    part(Batch([rows, rows.flip(0)]), Nesting([4]))[0].backward()
    assert part.learned["temperature"].grad[0] == 0
    assert part.learned["temperature"].grad[1] != 0


def test_values_per_width_and_code_follow_the_widths_of_a_step():
    codes = {"float32": 1.0, "binary": [0.0, 2.0, 3.0]}
    part = Part("quantised_info_nce", {"codes": codes, "temperature": {"float32": 0.1, "binary": [0.3, 0.2, 0.1]}},
                Nesting([8, 16, 32]))  # fmt: skip
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    drawn = Nesting([16, 32], [5.0, 1.0])
    total, values = part(Batch([rows, rows.flip(0)]), drawn)
    expected = nested_quantised_info_nce(
        rows, rows.flip(0), nesting=drawn, codes={"float32": 1.0, "binary": [2.0, 3.0]},
        temperature={"float32": 0.1, "binary": [0.2, 0.1]},
    )  # fmt: skip
    assert total == expected
    assert {code: len(each) for code, each in values.items()} == {"float32": 2, "binary": 2}
