from dataclasses import replace

import numpy as np
import pytest

from matryo.core.errors import InputError
from matryo.encoders.images import Pictures
from matryo.encoders.images.network import NetworkConfig
from matryo.training.towers import TowerConfig, load_towers, train_towers

COLOURS = ("red", "green", "blue")
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    """Pictures in three colours, dark and light, and what to call them."""
    rng = np.random.default_rng(0)
    kinds = np.arange(96) % 6
    pixels = rng.integers(0, 40, (96, 8, 8, 3), dtype=np.uint8)
    pixels[np.arange(96), :, :, kinds % 3] += np.where(kinds < 3, 60, 200).astype(np.uint8)[:, None, None]
    texts = [f"a {'dark' if kind < 3 else 'light'} {COLOURS[kind % 3]} square" for kind in kinds]
    return Pictures(pixels, None, ()), texts


@pytest.fixture
def config(tmp_path):
    network = NetworkConfig(RESNET, width=16, size=8, stem="small")
    return TowerConfig(
        tmp_path / "towers", network, widths=(8, 16), epochs=8, batch_size=24, padding=1, image_rate=5e-3
    )


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_each_finds_the_other_at_every_width(config, pairs, loss):
    pictures, texts = pairs
    seen = []
    made = train_towers(replace(config, loss=loss), pictures, texts, report=seen.append)
    assert seen[-1].losses[8] < seen[0].losses[8]
    again = load_towers(config.out)
    names = sorted(set(texts))
    for width in (8, 16):
        images = again.image.encode(pictures.pixels, width=width)
        words = again.text.encode(names, width=width)
        np.testing.assert_array_equal(images, made.image.encode(pictures.pixels, width=width))
        assert np.mean([names[n] == text for n, text in zip((images @ words.T).argmax(1), texts, strict=True)]) > 0.9
        assert np.mean([texts[n] == name for n, name in zip((words @ images.T).argmax(1), names, strict=True)]) > 0.8
    with pytest.raises(InputError, match="already holds towers"):
        train_towers(config, pictures, texts)


def test_pairs_that_do_not_fit(config, pairs):
    pictures, texts = pairs
    with pytest.raises(InputError, match="got 96 pictures and 95 texts"):
        train_towers(config, pictures, texts[1:])
    with pytest.raises(InputError, match=r"texts\[0\] is empty"):
        train_towers(config, pictures, ["", *texts[1:]])
    with pytest.raises(InputError, match="takes pictures of 8 pixels"):
        train_towers(config, replace(pictures, pixels=pictures.pixels[:, :4, :4]), texts)
    with pytest.raises(InputError, match="loss must be info_nce or sigmoid"):
        replace(config, loss="supcon")
    assert not config.out.exists()
