"""A mean of the weights before and after training."""

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

import matryo as mt
from matryo.core.errors import DamagedError, InputError, StorageError
from matryo.training import train
from matryo.training.blend import START, blend_with_start, save_start
from matryo.training.rotation import add_rotation


def weights(out):
    return load_file(out / "model.safetensors")["embedding.weight"]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_share_of_the_trained_weights(config, trained, share):
    options = {"base": str(trained), "learning_rate": 0.01}
    whole, mixed = config("whole", **options), config("mixed", blend=share, **options)
    train(whole)
    train(mixed)
    before, after = weights(trained), weights(whole.out)
    assert not np.allclose(before, after)
    np.testing.assert_allclose(weights(mixed.out), (1 - share) * before + share * after, atol=1e-6)
    assert not list(mixed.out.rglob(START))


def test_the_base_is_turned_before_it_is_mixed(config, trained, debian_rows):
    texts = [row["positive"] for row in debian_rows[:50]]
    turned, mixed = (config(name, base=str(trained), rotate="pca", **options) for name, options in (
        ("turned", {"epochs": 0}), ("mixed", {"blend": 0.001, "learning_rate": 0.01})
    ))  # fmt: skip
    np.testing.assert_allclose(train(mixed).encode(texts), train(turned).encode(texts), atol=0.01)


def test_every_weight_of_a_transformer_is_mixed(minilm, tmp_path):
    model = SentenceTransformer(str(minilm), device="cpu")
    texts = [f"text {n} about {what}" for what in ("chess", "music", "rain") for n in range(20)]
    add_rotation(model, [texts], "learned", mt.Nesting([12, 384]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_start(model, tmp_path)
    for value in model.parameters():
        value.data += 1
    blend_with_start(model, tmp_path, 0.25)
    parameters = dict(model.named_parameters())
    for name, value in model.state_dict().items():
        wanted = before[name] + 0.25 if name in parameters else before[name]
        np.testing.assert_allclose(value.numpy(), wanted.numpy(), atol=1e-5)


def test_weights_kept_that_cannot_be_used(interrupted, trained, minilm):
    options = {"base": str(trained), "blend": 0.5}
    run = interrupted(**options)
    kept = run.out / "checkpoints" / START
    kept.write_bytes(kept.read_bytes()[:-10])
    with pytest.raises(DamagedError, match="cannot be read"):
        train(run, resume=True)
    save_start(SentenceTransformer(str(minilm), device="cpu"), kept.parent)
    with pytest.raises(DamagedError, match="another model's weights"):
        train(run, resume=True)


def test_a_full_disk_is_named(config, trained, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("matryo.training.blend.save_file", full)
    with pytest.raises(StorageError, match="keeping the weights to blend with in"):
        train(config(base=str(trained), blend=0.5))


def test_what_cannot_be_mixed_is_refused(config, trained):
    with pytest.raises(InputError, match="blend mixes trained weights with those of a model that exists"):
        config(blend=0.5)
    with pytest.raises(InputError, match="with lora lower its alpha"):
        config(base=str(trained), blend=0.5, lora=4)
    with pytest.raises(InputError, match="a classifier has none before"):
        config(base=str(trained), blend=0.5, loss="cross_entropy")
    for share in (0, 1.5, float("nan")):
        with pytest.raises(InputError, match="blend: Input should be"):
            config(base=str(trained), blend=share)
