"""The parts of static training against their slow twins."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import nn

from matryo.core.errors import InputError
from matryo.core.records import Pairs, read_pairs
from matryo.training import StaticConfig, static, train
from matryo.training.config import DataConfig
from matryo.training.data import Rows, token_datasets
from matryo.training.static import RowSparseBag, TokenBags, make_row_sparse, merge_bags, new_static, train_tokenizer

TEXTS = ["mail server", "a puzzle game", "server", "mail mail mail", "game server for mail"]

bags = st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=6), min_size=1, max_size=8)


def flat(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    starts = np.cumsum([0, *(len(text) for text in texts[:-1])])
    return torch.tensor([token for text in texts for token in text]), torch.from_numpy(starts)


@given(bags, st.integers(0, 5))
def test_row_sparse_bag_equals_embedding_bag(texts, seed):
    weight = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))
    outward = torch.randn(len(texts), 4, generator=torch.Generator().manual_seed(seed + 1))
    plain = nn.EmbeddingBag(20, 4, mode="mean", _weight=weight.clone())
    sparse = RowSparseBag(20, 4, mode="mean", _weight=weight.clone())
    ids, offsets = flat(texts)
    expected, found = plain(ids, offsets), sparse(ids, offsets)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    expected.backward(outward)
    found.backward(outward)
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(sparse.weight.grad.to_dense(), plain.weight.grad, rtol=0, atol=1e-6)


def test_a_step_changes_the_touched_rows_only(debian_rows):
    pairs = Pairs([row["anchor"] for row in debian_rows], [row["positive"] for row in debian_rows])
    model = new_static(StaticConfig(width=8, vocabulary=500), [*pairs.anchors, *pairs.positives], seed=0)
    make_row_sparse(model)
    before = model[0].embedding.weight.detach().clone()
    features = model.preprocess(["mail server", "puzzle"])
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    model[0].embedding(features["input_ids"], features["offsets"]).square().sum().backward()
    gradient = model[0].embedding.weight.grad
    assert len(gradient._values()) == len(features["input_ids"].unique()), "each row once"
    used = features["input_ids"].unique()
    assert torch.equal(gradient._indices()[0], used)
    optimizer.step()
    changed = (model[0].embedding.weight.detach() != before).any(1).nonzero().squeeze(1)
    assert torch.equal(changed, used)


@given(st.lists(st.integers(0, len(TEXTS) - 1), max_size=12))
def test_token_bags_take_the_texts_asked_for(rows):
    tokenizer = train_tokenizer(TEXTS * 3, 100)
    taken, offsets = TokenBags(tokenizer, TEXTS).take(np.array(rows, np.int64))
    expected = [tokenizer.encode(TEXTS[row], add_special_tokens=False).ids for row in rows]
    assert taken.tolist() == [token for ids in expected for token in ids]
    assert offsets.tolist() == np.cumsum([0, *(len(ids) for ids in expected)])[:-1].tolist()


def test_texts_are_tokenised_in_parts(monkeypatch):
    tokenizer = train_tokenizer(TEXTS * 3, 100)
    whole = TokenBags(tokenizer, TEXTS)
    monkeypatch.setattr(static, "TEXTS", 2)
    parts = TokenBags(tokenizer, TEXTS)
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.starts.tolist() == whole.starts.tolist()
    assert TokenBags(tokenizer, []).starts.tolist() == [0]


def test_batches_from_arrays_are_those_of_the_table():
    scores = np.linspace(0, 1, len(TEXTS))
    config = DataConfig(path="x", loss="cosent")
    rows = Rows("scored", config, {"first": TEXTS, "second": TEXTS[::-1]}, scores)
    dataset, _ = token_datasets([rows], train_tokenizer(TEXTS * 3, 100))
    keys = [3, 0, 0, 4]
    assert dataset.__getitems__(keys) == [dataset[key] for key in keys]
    assert dataset.select([4, 2]).__getitems__([1]) == [dataset[2]]
    assert dataset.select([4, 2, 1, 3, 0]).__getitems__([1]) == [dataset[2]]
    assert dataset.remove_columns("label").__getitems__([1]) == [{key: dataset[1][key] for key in ("first", "second")}]
    named = dataset.with_transform(lambda batch: batch | {"dataset_name": ["scored"] * len(batch["first"])})
    assert named.__getitems__([1]) == [dataset[1] | {"dataset_name": "scored"}]


def test_merged_bags_are_the_columns_one_after_the_other():
    weight = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    bag = nn.EmbeddingBag(20, 4, mode="mean", _weight=weight)
    columns = [
        dict(zip(("input_ids", "offsets"), flat(texts), strict=True)) for texts in ([[1, 2], [3]], [[4], [5, 6]])
    ]
    merged = merge_bags(columns)
    apart = torch.cat([bag(column["input_ids"], column["offsets"]) for column in columns])
    assert torch.equal(bag(merged["input_ids"], merged["offsets"]), apart)


def test_text_without_tokens_is_named_and_nothing_is_written(config, tmp_path):
    pairs = tmp_path / "control.jsonl"
    pairs.write_text('{"anchor": "mail", "positive": "server"}\n{"anchor": "\\u0001", "positive": "game"}\n')
    with pytest.raises(InputError, match=r"control\.jsonl: anchor of row 2 has no tokens"):
        train(config(pairs=pairs))
    assert not (tmp_path / "model").exists()


def given_vectors(folder, pairs_file, rows=None):
    pairs = read_pairs(pairs_file)
    tokenizer = train_tokenizer([*pairs.anchors, *pairs.positives], 300)
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.random.default_rng(0).standard_normal((rows or tokenizer.get_vocab_size(), 24)).astype(np.float32)
    np.save(folder / "table.npy", table)
    return StaticConfig(tokenizer=folder / "tokenizer.json", vectors=folder / "table.npy"), table


def test_starts_from_given_vectors(pairs_file, tmp_path, config):
    static, table = given_vectors(tmp_path, pairs_file)
    model = new_static(static, [*read_pairs(pairs_file).anchors, *read_pairs(pairs_file).positives], seed=0)
    assert np.array_equal(model[0].embedding.weight.detach().numpy(), table)
    trained = train(config(static=static, widths=(6, 24), max_steps=2))
    assert trained.width == 24
    assert trained.encoder.table.shape == table.shape


def test_given_vectors_must_fit_their_tokenizer(pairs_file, tmp_path, config):
    static, _ = given_vectors(tmp_path, pairs_file, rows=7)
    with pytest.raises(InputError, match=r"table\.npy has 7 rows, but .*tokenizer\.json has \d+ tokens"):
        train(config(static=static))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        train(config(static=static))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no such file"):
        train(config(static=static))
    assert not (tmp_path / "model").exists()


def test_rare_words_start_longer_than_frequent_ones():
    pairs = Pairs(["common one", "common two", "common three"], ["common rare", "common four", "common five"])
    model = new_static(StaticConfig(width=64, vocabulary=100), [*pairs.anchors, *pairs.positives], seed=0)
    tokenizer: Tokenizer = model[0].tokenizer
    length = model[0].embedding.weight.detach().norm(dim=1)
    assert length[tokenizer.token_to_id("common")] < 0.1 * length[tokenizer.token_to_id("rare")]
