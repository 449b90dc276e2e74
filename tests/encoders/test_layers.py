"""Depth: the first layers of an encoder give exactly what the whole encoder gives there, whatever its architecture."""

import numpy as np
import pytest
import torch

import matryo as mt
from matryo.core.errors import InputError
from matryo.encoders.layers import Layers
from matryo.encoders.sentence_transformer import SentenceTransformerEncoder

TEXTS = ["a puzzle game for the terminal", "mail", "A longer text, so that padding plays a part in this batch."]
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
KEYS = {"num_key_value_heads": 1}
POST_NORM = {
    "BertConfig": SMALL,
    "MPNetConfig": SMALL,
    "RobertaConfig": SMALL,
    "DebertaV2Config": SMALL,
    "DistilBertConfig": {"dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64},
}
PRE_NORM = {
    "ModernBertConfig": SMALL,
    "Qwen2Config": {**SMALL, **KEYS},
    "Qwen3Config": {**SMALL, **KEYS, "head_dim": 16},
    "LlamaConfig": {**SMALL, **KEYS},
    "Gemma3TextConfig": {**SMALL, **KEYS, "head_dim": 16},
    "T5Config": {"d_model": 32, "num_layers": 4, "num_heads": 2, "d_kv": 16, "d_ff": 64},
}
ALL = {**POST_NORM, **PRE_NORM}


@pytest.fixture
def build(minilm, tmp_path):
    """`build("BertConfig")`: a small random encoder of that architecture as a SentenceTransformer."""

    def make(name: str, **changes):
        import transformers
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm))
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        fields = {"vocab_size": len(tokenizer), **(special if name == "ModernBertConfig" else {})}
        torch.manual_seed(0)
        config = getattr(transformers, name)(**fields, **(ALL.get(name) or SMALL), **changes)
        maker = transformers.T5EncoderModel if name == "T5Config" else transformers.AutoModel.from_config
        folder = tmp_path / name
        maker(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32), Normalize()], device="cpu").eval()

    return make


def run(model, texts=TEXTS):
    return model(model.preprocess(texts))["sentence_embedding"]


@pytest.mark.parametrize("name", ALL)
def test_what_is_served_is_what_is_trained(build, name, tmp_path):
    """The embedding that training sees at a depth, that of the cut encoder, and that of its saved folder are equal."""
    model = build(name)
    layers = Layers(model)
    assert layers.count == 4
    with torch.no_grad():
        seen = layers.embeddings(model.preprocess(TEXTS), [1, 3, 4])
        for place, depth in enumerate((1, 3)):
            low = layers.cut(depth)
            torch.testing.assert_close(seen[:, place], run(low), rtol=0, atol=1e-6)
            low.save_pretrained(str(tmp_path / f"cut-{depth}"))
            again = SentenceTransformerEncoder.load(str(tmp_path / f"cut-{depth}"), "cpu")
            assert again.layers.count == depth
            np.testing.assert_allclose(again.vectors(TEXTS), run(low).numpy(), atol=1e-6)
        torch.testing.assert_close(seen[:, 2], run(model), rtol=0, atol=0)
    assert layers.count == Layers(model).count == 4, "the whole encoder is as it was"


@pytest.mark.parametrize("name", ALL)
def test_chosen_layers_are_run_in_the_order_given(build, name, tmp_path):
    """Slow twin: the same layers put into the encoder by hand; and what is saved is what was chosen."""
    model = build(name)
    layers = Layers(model)
    chosen = layers.choose([1, 4, 3])
    torch.testing.assert_close(run(layers.choose([1, 2, 3, 4])), run(model), rtol=0, atol=0)
    torch.testing.assert_close(run(layers.choose([1, 2])), run(layers.cut(2)), rtol=0, atol=0)
    chosen.save_pretrained(str(tmp_path / "chosen"))
    again = SentenceTransformerEncoder.load(str(tmp_path / "chosen"), "cpu")
    assert again.layers.count == 3
    made = run(chosen).detach()
    np.testing.assert_allclose(again.vectors(TEXTS), made.numpy(), atol=1e-6)
    own = {tensor.data_ptr() for tensor in model.parameters()}
    assert not any(tensor.data_ptr() in own for tensor in chosen.parameters()), "training it leaves the base as it was"
    blocks = model[0].auto_model.get_submodule(layers._place)
    blocks[1], blocks[2] = blocks[3], blocks[2]
    del blocks[3]
    torch.testing.assert_close(run(model).detach(), made, rtol=0, atol=1e-6)


def test_a_layer_may_be_chosen_twice_with_weights_of_its_own(build):
    model = build("BertConfig")
    chosen = Layers(model).choose([1, 4, 3, 4])
    first, second = (chosen[0].auto_model.encoder.layer[n] for n in (1, 3))
    for name, one in first.named_parameters():
        other = second.get_parameter(name)
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [
        ("BertConfig", [], "layers must name at least one of the encoder's 4"),
        ("BertConfig", [1, 5], r"a layer must be a whole number in 1..4, the encoder's layers; got 5"),
        ("BertConfig", [0], "got 0"),
        ("T5Config", [2, 4], r"T5EncoderModel does not take its layers in the order \[2, 4\]: .* keep it where it was"),
        ("ModernBertConfig", [1, 1], "keep it where it was, and once"),
    ],
)
def test_layers_that_cannot_be_chosen_are_refused(build, name, layers, said):
    with pytest.raises(InputError, match=said):
        Layers(build(name)).choose(layers)


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_pre_norm_encoder_is_normed_after_any_depth(build, name):
    """The norm at the end of the whole encoder is part of every depth: without it the vectors are others."""
    model = build(name)
    layers = Layers(model)
    assert len(layers._after) == 1
    with torch.no_grad():
        # A norm of weight 1 may not show after pooling and normalising; trained ones are not of weight 1.
        for parameter in layers._after[0].parameters():
            parameter.copy_(torch.linspace(-1, 2, 32))
        seen = layers.embeddings(model.preprocess(TEXTS), [2, 4])[:, 0]
        torch.testing.assert_close(seen, run(layers.cut(2)), rtol=0, atol=1e-6)
        layers._after = ()
        assert (layers.embeddings(model.preprocess(TEXTS), [2, 4])[:, 0] - seen).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["BertConfig", "ModernBertConfig"])
def test_gradients_are_those_of_the_cut_encoder(build, name):
    model = build(name)
    layers, low = Layers(model), Layers(model).cut(2)
    target = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    (layers.embeddings(model.preprocess(TEXTS), [2])[:, 0] * target).sum().backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (run(low) * target).sum().backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys()
    assert not any(".3." in name for name in mine), "layers above get no gradient"
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6)


def test_the_cut_encoder_shares_its_weights(build):
    model = build("BertConfig")
    low = Layers(model).cut(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    own, other = dict(low.named_parameters()), dict(model.named_parameters())
    assert all(parameter is other[key] for key, parameter in own.items())
    assert sum(p.numel() for p in low.parameters()) < sum(p.numel() for p in model.parameters())


def test_training_mode_and_hooks_are_left_as_they_were(build):
    model = build("BertConfig").train()
    layers = Layers(model)
    assert model.training
    assert all(module.training for module in model.modules())
    layers.embeddings(model.preprocess(TEXTS), [1, 4])
    assert not any(module._forward_hooks for module in model.modules())


def test_an_encoder_whose_layers_cannot_be_cut_is_named(build):
    with pytest.raises(InputError, match=r"AlbertModel has no single list of its 4 .*depths work for BERT") as caught:
        Layers(build("AlbertConfig"))
    assert "\n" not in str(caught.value)


def test_an_encoder_that_goes_on_after_its_layers_is_refused(build):
    """Something between the last layer and the output that is no module of its own cannot be repeated."""
    model = build("BertConfig")
    backbone = model[0].auto_model
    inner = backbone.forward

    # As an encoder would that mixes in its input once more at the end.
    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * 2 + 1
        return out

    backbone.forward = forward
    with pytest.raises(InputError, match="BertModel does something after its last layer that cannot be repeated"):
        Layers(model)


@pytest.mark.parametrize("depth", [0, 5, True, 2.0, "2"])
def test_depth_beyond_the_encoder(build, depth):
    with pytest.raises(InputError, match=r"depth must be a whole number in 1..4, the encoder's layers; got "):
        Layers(build("BertConfig")).cut(depth)


def test_static_models_have_no_layers(trained):
    model = mt.load(trained)
    with pytest.raises(InputError, match="depth 2 was not trained; this model has only the full depth"):
        model.encode(["a text"], depth=2)


def test_minilm_runs_fewer_layers(minilm):
    from sentence_transformers import SentenceTransformer

    encoder = mt.load(minilm, device="cpu").encoder
    low = encoder.at(3)
    assert low is encoder.at(3)
    plain = SentenceTransformer(str(minilm), device="cpu")
    plain[0].auto_model.encoder.layer = plain[0].auto_model.encoder.layer[:3]
    np.testing.assert_allclose(low.vectors(TEXTS), plain.encode(TEXTS), atol=1e-6)
