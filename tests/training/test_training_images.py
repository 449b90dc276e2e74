import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from matryo import load
from matryo.core.errors import DamagedError, InputError
from matryo.encoders.images import Pictures
from matryo.encoders.images.network import NetworkConfig
from matryo.training import load_head
from matryo.training.images import STATE, ImageConfig, by_class, train_images

RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures():
    """Three classes that differ in colour."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    pixels = rng.integers(0, 120, (96, 8, 8, 3), dtype=np.uint8)
    pixels[np.arange(96), :, :, labels] += 100
    return Pictures(pixels, labels, ("red", "green", "blue"))


@pytest.fixture
def config(tmp_path):
    network = NetworkConfig(RESNET, width=16, size=8, stem="small")
    return ImageConfig(tmp_path / "run", network, widths=(4, 16), epochs=3, batch_size=16, padding=1)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_classify_at_every_width_after_loading(config, pictures, tied):
    seen = []
    train_images(replace(config, tied=tied), pictures, report=seen.append)
    assert [said.epoch for said in seen] == [1, 2, 3]
    assert set(seen[0].losses) == {4, 16}
    model = load(config.out)
    head, classes = load_head(config.out)
    assert classes == ["red", "green", "blue"]
    assert head.tied is tied
    vectors = torch.from_numpy(model.encoder.vectors(pictures.pixels, 32, False))
    for width in (4, 16):
        assert (head(vectors, width=width).argmax(1).numpy() == pictures.labels).mean() > 0.9
    assert not (config.out / STATE).exists()


@pytest.mark.parametrize("loss", ["cross_entropy", "supcon", "multi_similarity"])
def test_a_resumed_run_is_bit_equal(tmp_path, config, pictures, loss):
    config = replace(config, loss=loss, learning_rate=0.02)
    whole = train_images(config, pictures).encoder.vectors(pictures.pixels, 32, False)
    other = replace(config, out=tmp_path / "other")

    def stop(said):
        if said.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_images(other, pictures, report=stop)
    with pytest.raises(InputError, match="holds an unfinished run"):
        train_images(other, pictures)
    with pytest.raises(InputError, match="run of another configuration"):
        train_images(replace(other, seed=1), pictures, resume=True)
    seen = []
    again = train_images(other, pictures, resume=True, report=seen.append)
    assert [said.epoch for said in seen] == [2, 3]
    np.testing.assert_array_equal(again.encoder.vectors(pictures.pixels, 32, False), whole)
    with pytest.raises(InputError, match="already holds a trained model"):
        train_images(other, pictures)
    loaded = train_images(other, pictures, resume=True)
    np.testing.assert_array_equal(loaded.encoder.vectors(pictures.pixels, 32, False), whole)


def test_a_damaged_checkpoint_is_told(config, pictures):
    config.out.mkdir()
    (config.out / STATE).write_bytes(b"short")
    with pytest.raises(DamagedError, match="cannot be read"):
        train_images(config, pictures, resume=True)


def test_contrast_brings_classes_together(config, pictures):
    model = train_images(replace(config, loss="supcon"), pictures)
    with pytest.raises(InputError, match="holds no head"):
        load_head(config.out)
    for width in (4, 16):
        units = model.encode(pictures.pixels, width=width)
        cosines = units @ units.T - 2 * np.eye(96)
        assert (pictures.labels[cosines.argmax(1)] == pictures.labels).mean() > 0.9


def test_pictures_that_do_not_fit_are_refused_before_writing(config, pictures):
    single = Pictures(pictures.pixels[:3], np.arange(3), pictures.classes)
    with pytest.raises(InputError, match="every class has one"):
        train_images(replace(config, loss="supcon"), single)
    with pytest.raises(InputError, match="have no labels"):
        train_images(config, replace(pictures, labels=None))
    with pytest.raises(InputError, match="takes pictures of 8 pixels"):
        train_images(config, replace(pictures, pixels=pictures.pixels[:, :4, :4]))
    with pytest.raises(InputError, match="nothing to train on"):
        train_images(config, Pictures(pictures.pixels[:1], np.zeros(1, int), ("red",)))
    assert not config.out.exists()


def test_one_picture_a_class_trains_with_cross_entropy(config, pictures):
    single = Pictures(pictures.pixels[:3], np.arange(3), pictures.classes)
    assert train_images(replace(config, epochs=1), single).width == 16


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loss": "info_nce"}, "loss must be cross_entropy, supcon or multi_similarity"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"loss": "supcon", "tied": True}, "tied is for the heads"),
    ],
)
def test_configurations_are_checked(config, fields, said):
    with pytest.raises(InputError, match=said):
        replace(config, **fields)


def test_batches_of_classes_keep_partners_together():
    labels = np.array([0] * 7 + [1] * 4 + [2])
    order = by_class(labels, 2, np.random.default_rng(0))
    assert sorted(order) == list(range(12))
    # Five pairs first, then the two rows that have no partner left.
    assert (labels[order[:10:2]] == labels[order[1:10:2]]).all()
    assert sorted(labels[order[10:]]) == [0, 2]


def test_cards_hold_the_run(config, pictures):
    train_images(config, pictures)
    said = json.loads((config.out / "matryo.json").read_text())["training"]
    assert said["config"]["seed"] == 0
    assert said["pictures"] == 96
    assert "out" not in said["config"]
