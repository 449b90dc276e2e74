"""Gradient caching against the same mini-batches with their graphs kept, and against the whole batch at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import nn

import matryo as mt
from matryo.losses import nested_info_nce
from matryo.training.caching import cached_embeddings

NESTING = mt.Nesting([2, 5, 8], [1.0, 0.5, 2.0])


class Encoder(nn.Module):
    """(B, 6) features to (B, 8), with dropout; counts its calls."""

    def __init__(self, dropout=0.3):
        super().__init__()
        make = torch.Generator().manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=make) / 2
        self.calls = []

    def forward(self, features):
        self.calls.append((len(features["x"]), torch.is_grad_enabled()))
        features["sentence_embedding"] = self.layers(features["x"])
        return features


def batch(sizes, dtype=torch.float64):
    make = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(size, 6, generator=make, dtype=torch.float64).to(dtype)} for size in sizes]


def whole(model, features):
    return [model(dict(f))["sentence_embedding"] for f in features]


def in_parts(size):
    """The same mini-batches in the same order, all graphs kept: what caching has to reproduce."""

    def embed(model, features):
        columns = []
        for f in features:
            parts = [{"x": f["x"][n : n + size]} for n in range(0, len(f["x"]), size)]
            columns.append(torch.cat([model(part)["sentence_embedding"] for part in parts]))
        return columns

    return embed


def cached(size, **options):
    return lambda model, features: cached_embeddings(model, features, mini_batch_size=size, **options)


def loss_of(columns, **options):
    anchors, *others = columns
    return nested_info_nce(anchors, torch.cat(others), nesting=NESTING, temperature=0.3, **options)


def gradients(embed, model, features, loss=loss_of, scale=1.0):
    model.zero_grad()
    torch.manual_seed(3)
    value = loss(embed(model, features))
    (value * scale).backward()
    return [value.detach(), *(p.grad for p in model.parameters())]


def assert_same(got, expected, tolerance=1e-10):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 13), negatives=st.integers(0, 2), mini=st.integers(1, 14))
def test_exact_with_dropout(size, negatives, mini):
    model, features = Encoder().double(), batch([size] * (2 + negatives))
    assert_same(gradients(cached(mini), model, features), gradients(in_parts(mini), model, features))
    model.eval()
    assert_same(gradients(cached(mini), model, features), gradients(whole, model, features))


def test_columns_of_different_lengths():
    model, features = Encoder().double(), batch([5, 9])
    assert_same(gradients(cached(4), model, features), gradients(in_parts(4), model, features))


def test_each_mini_batch_is_embedded_twice_and_the_loss_computed_once():
    model, losses = Encoder().double(), []

    def counted(columns):
        losses.append([tuple(c.shape) for c in columns])
        return loss_of(columns)

    gradients(cached(4), model, batch([10, 10]), counted)
    rows = [4, 4, 2] * 2
    assert model.calls == [(n, False) for n in rows] + [(n, True) for n in rows]
    assert losses == [[(10, 8), (10, 8)]]


def test_upstream_factors_and_accumulation_reach_the_parameters():
    model, features = Encoder().double(), batch([7, 7])
    plain = gradients(cached(3), model, features)
    scaled = gradients(cached(3), model, features, scale=2.0**16)
    assert_same([g / 2.0**16 for g in scaled[1:]], plain[1:])
    torch.manual_seed(3)
    loss_of(cached_embeddings(model, features, mini_batch_size=3)).backward()
    assert_same([p.grad / (2.0**16 + 1) for p in model.parameters()], plain[1:])


def test_a_losss_own_parameters_get_their_gradient():
    model, features = Encoder().double(), batch([7, 7])
    results = []
    for embed in (cached(3), in_parts(3)):
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

        def loss(columns, temperature=temperature):
            return nested_info_nce(*columns, nesting=NESTING, temperature=temperature)

        results.append([*gradients(embed, model, features, loss, scale=8.0), temperature.grad])
    assert_same(*results)


def test_a_column_without_gradient_is_not_embedded_again():
    model, features = Encoder().double(), batch([6, 6])

    def loss(columns):
        return loss_of([columns[0], columns[1].detach()])

    gradients(cached(4), model, features, loss)
    assert model.calls[4:] == [(4, True), (2, True)]


def test_without_gradients_nothing_is_kept():
    model, features = Encoder().double(), batch([6])
    with torch.no_grad():
        (column,) = cached_embeddings(model, features, mini_batch_size=4)
    assert not column.requires_grad
    frozen = Encoder().requires_grad_(False)
    (column,) = cached_embeddings(frozen, batch([6], torch.float32), mini_batch_size=4)
    column.sum().backward()
    assert all(p.grad is None for p in frozen.parameters())


def test_the_random_stream_goes_on_as_if_embedded_once():
    model, features = Encoder().double(), batch([7, 7])
    after = []
    for embed in (cached(3), in_parts(3)):
        gradients(embed, model, features)
        after.append(torch.rand(3))
    assert torch.equal(*after)


class Careless(Encoder):
    """Changes its input in place."""

    def forward(self, features):
        features["x"].mul_(2)
        return super().forward(features)


def test_nothing_of_the_users_is_changed():
    model, features = Careless().double(), batch([7, 7])
    before, kept = [f["x"].clone() for f in features], dict(model.__dict__)
    got = gradients(cached(3), model, features)
    assert all(torch.equal(f["x"], x) and list(f) == ["x"] for f, x in zip(features, before, strict=True))
    assert dict(model.__dict__) == kept
    assert "forward" not in model.__dict__
    doubled = [{"x": 2 * x} for x in before]
    same = Encoder().double()
    assert_same(got, gradients(in_parts(3), same, doubled))


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_replayed(backward_inside):
    model, features = Encoder(), batch([9, 9], torch.float32)
    results, kinds = [], []
    for embed in (cached(4), in_parts(4)):
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            columns = embed(model, features)
            value = loss_of(columns)
            if backward_inside:
                value.backward()
        if not backward_inside:
            value.backward()
        kinds.append([c.dtype for c in columns])
        results.append([value.detach(), *(p.grad for p in model.parameters())])
    assert kinds == [[torch.bfloat16] * 2] * 2
    assert all(g.abs().max() > 0 for g in results[0])
    # The mini-batches' gradients of a weight add up in float32 here, in bfloat16 there.
    assert_same(*results, tolerance=2e-2)


@pytest.fixture(scope="module")
def texts():
    return [f"number {n} " + "and more " * (n % 5) for n in range(14)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformer_with_dropout_and_padding(minilm, texts, checkpointing):
    model = SentenceTransformer(str(minilm), device="cpu")
    model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:2]
    model.double()
    if checkpointing:
        model[0].auto_model.activation_checkpointing_enable()
    model.train()
    nesting = mt.Nesting([32, 384])
    features = [model.preprocess(texts[:7]), model.preprocess(texts[7:])]
    unpadded = []
    for f in features:
        cuts = [slice(0, 3), slice(3, 6), slice(6, 7)]
        longest = [int(f["attention_mask"][cut].sum(1).max()) for cut in cuts]
        parts = [
            {k: x[cut, :n] if isinstance(x, torch.Tensor) else x for k, x in f.items()}
            for cut, n in zip(cuts, longest, strict=True)
        ]
        unpadded.append(parts)

    def parts_kept(model, _):
        return [torch.cat([model(dict(p))["sentence_embedding"] for p in parts]) for parts in unpadded]

    def loss(columns):
        return nested_info_nce(*columns, nesting=nesting)

    def used(results):
        return [g for g in results if g is not None]

    expected = used(gradients(parts_kept, model, features, loss))
    assert_same(used(gradients(cached(3), model, features, loss)), expected)
    model.eval()
    by_tokens = used(gradients(cached(3, mini_batch_tokens=20), model, features, loss))
    assert_same(by_tokens, used(gradients(whole, model, features, loss)))


@pytest.mark.parametrize(
    ("features", "options", "says"),
    [
        ([{"x": torch.ones(2, 6)}], {"mini_batch_size": 0}, "at least 1 row, got 0"),
        ([{"x": torch.ones(2, 6)}], {"mini_batch_size": 2, "mini_batch_tokens": 0}, "0 tokens"),
        ([{"input_ids": torch.ones(9), "offsets": torch.zeros(2)}], {"mini_batch_size": 1}, "static encoder"),
    ],
)
def test_bad_input_is_named(features, options, says):
    with pytest.raises(ValueError, match=says):
        cached_embeddings(Encoder(), features, **options)
