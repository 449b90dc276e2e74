"""Texts of like length together: the same embeddings and gradients with less padding; batches of neighbours."""

import itertools
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

import matryo as mt
from matryo.core.errors import InputError
from matryo.losses import nested_distill
from matryo.training import TrainConfig, train
from matryo.training.data import NeighbourBatches
from matryo.training.lengths import alike, by_length, cheapest_parts, embed_alike, trimmed
from matryo.training.objective import NestedObjective, Part

NESTING = mt.Nesting([8, 32])
TEXTS = [" ".join(["word"] * (1 + 7 * n % 20)) for n in range(50)]


@pytest.fixture
def model(small_bert):
    return SentenceTransformer(str(small_bert), device="cpu").eval()


def objective(model, size=None):
    return NestedObjective(model, NESTING, {"a": Part("info_nce", {}, NESTING)}, mini_batch_size=size)


def test_parts_of_like_length_are_embedded_as_the_whole_batch_with_less_padding(model):
    features = model.preprocess(TEXTS)
    whole = model(dict(features))["sentence_embedding"]
    seen = []

    def run(part):
        seen.append(tuple(part["attention_mask"].shape))
        return model(part)

    found = embed_alike(run, features)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert sum(rows for rows, _ in seen) == len(TEXTS)
    real = int(features["attention_mask"].sum())
    assert real <= sum(rows * length for rows, length in seen) < 0.85 * features["attention_mask"].numel()
    assert features["attention_mask"].shape == model.preprocess(TEXTS)["attention_mask"].shape, "the caller's are kept"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 200))
@settings(deadline=None)
def test_parts_are_the_cheapest_of_all_ways_to_cut(lengths, call):
    """Slow twin: every way to cut the rows, counted."""
    rows = np.sort(lengths)[::-1]
    parts = cheapest_parts(rows, call)
    assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == len(rows)

    def cost(ends):
        return sum((end - begin) * rows[begin] + call for begin, end in itertools.pairwise([0, *ends]))

    places = range(1, len(rows))
    ways = itertools.chain.from_iterable(itertools.combinations(places, n) for n in range(len(rows)))
    assert cost([end for _, end in parts]) == min(cost([*way, len(rows)]) for way in ways)


@pytest.mark.parametrize("size", [None, 7])
def test_the_objective_has_the_gradient_of_whole_padded_batches(model, size):
    columns = [model.preprocess(TEXTS[:25]), model.preprocess(TEXTS[25:])]
    plain = [model(dict(f))["sentence_embedding"] for f in columns]
    mt.losses.nested_info_nce(*plain, nesting=NESTING).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    objective(model, size)(columns, None)[0].backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5)


def test_mixed_precision_runs_the_model_in_it_and_gives_float32(model):
    columns = [model.preprocess(TEXTS[:25])]
    exact = objective(model).embed(columns)[0]
    made = NestedObjective(model, NESTING, {"a": Part("info_nce", {}, NESTING)}, bfloat16=True)
    (mixed,) = made.embed(columns)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixed, embed_alike(model, columns[0]).float(), rtol=0, atol=0)
    assert mixed.dtype == torch.float32
    assert 1e-5 < (mixed - exact).abs().max() < 0.02


def test_padding_on_the_left_and_features_of_other_kinds_stay_as_they_are():
    mask = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])
    ids = torch.arange(8).reshape(2, 4)
    cut = trimmed({"attention_mask": mask, "input_ids": ids, "prompt_length": 3})
    assert cut["attention_mask"].tolist() == [[0, 0, 1], [0, 1, 1]]
    assert cut["input_ids"].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert cut["prompt_length"] == 3
    assert trimmed({"attention_mask": torch.zeros(2, 3)})["attention_mask"].shape == (2, 1)
    pictures = {"pixel_values": torch.ones(2, 3, 4, 4)}
    flat = {"attention_mask": mask, "cu_seq_lens": torch.tensor([0, 1, 3])}
    for features in (pictures, flat):
        assert by_length(features) == (features, None)
    ordered, where = by_length({"attention_mask": mask, "input_ids": ids})
    assert ordered["input_ids"].tolist() == ids[[1, 0]].tolist()
    assert where.tolist() == [1, 0]
    assert len(list(alike(ordered))) == 1


def test_neighbours_come_together_once_an_epoch_and_in_other_company_the_next():
    dataset = Dataset.from_dict({"text": [str(n) for n in range(23)]})
    parts = [np.arange(0, 12), np.arange(12, 23)]
    made = NeighbourBatches(dataset, parts, batch_size=4, drop_last=False, seed=3)
    epochs = []
    for epoch in range(2):
        made.set_epoch(epoch)
        batches = list(made)
        assert len(batches) == len(made) == 6
        assert sorted(n for batch in batches for n in batch) == list(range(23))
        assert sum(len({n < 12 for n in batch}) > 1 for batch in batches) <= 1, "one batch at most holds two parts"
        epochs.append(batches)
    assert epochs[0] != epochs[1]
    again = NeighbourBatches(dataset, parts, batch_size=4, drop_last=True, seed=3)
    assert len(list(again)) == len(again) == 5


def test_a_model_teaches_its_own_prefixes_from_texts_alone(config, debian_rows, tmp_path):
    """Turned, it keeps every cosine of whole vectors, and prefixes say more of them; trained, they say more still."""
    plain = config("plain", widths=(32,), epochs=6, save_steps=None)
    whole = train(plain)
    texts = [row["positive"] for row in debian_rows]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"pairs": file, "base": str(plain.out), "loss": "distill", "loss_args": {"kind": "neighbours"}}
    options |= {"widths": (4, 8, 32), "rotate": "learned", "save_steps": None}
    turned = train(config("turned", **options, epochs=0))
    before, after = (torch.from_numpy(model.encode(texts)) for model in (whole, turned))
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0, atol=1e-4)
    for width in (4, 8):
        said = [
            nested_distill(x[:, :width], before, nesting=mt.Nesting([width]), kind="neighbours")
            for x in (before, after)
        ]
        assert said[1] < 0.95 * said[0]

    seen = []
    train(config("nested", **options, neighbours=True, epochs=10, learning_rate=0.01), report=seen.append)
    first, *_, last = (step.losses for step in seen if step.losses)
    assert last[4] < 0.9 * first[4]
    assert last[8] < 0.9 * first[8]
    assert last[32] < 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "neighbours makes batches by a teacher's vectors"),
        ({"loss": "margin_mse", "teacher": "toy"}, "neighbours makes batches by a teacher's vectors"),
        (
            {"loss": "guided_info_nce", "teacher": "toy", "no_duplicates": True},
            "neighbours and no_duplicates both choose the batches",
        ),
    ],
)
def test_neighbours_where_there_are_none(options, said, pairs_file, tmp_path):
    with pytest.raises(ValueError, match=said):
        TrainConfig(pairs=pairs_file, out=tmp_path / "x", neighbours=True, **options)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_cannot_be_is_refused_before_anything_is_encoded(temperature, pairs_file, tmp_path):
    taught = {"loss": "distill", "loss_args": {"kind": "neighbours", "temperature": temperature}, "teacher": "toy"}
    with pytest.raises(InputError, match=r"temperature must be finite and above 0, got"):
        TrainConfig(pairs=pairs_file, out=tmp_path / "x", **taught)
