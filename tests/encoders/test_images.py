import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from matryo import load
from matryo.core.errors import DamagedError, InputError
from matryo.core.prefix import Nesting, truncate
from matryo.encoders import Card, Model
from matryo.encoders.folder import write_card
from matryo.encoders.images import decode, read_pictures
from matryo.encoders.images.augment import crop_and_flip
from matryo.encoders.images.encoder import ImageEncoder
from matryo.encoders.images.network import Network, NetworkConfig, pretrained

RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip
VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
DINO = {**VIT, "model_type": "dinov2"}


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return ImageEncoder(Network(NetworkConfig(RESNET, width=16, size=8, stem="small")))


@pytest.fixture
def folder(tmp_path, pixels):
    for n, picture in enumerate(pixels):
        place = tmp_path / "set" / ("cat" if n % 2 else "ant")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.png").write_bytes(png(picture))
    return tmp_path / "set"


def test_every_form_of_a_picture_gives_the_same_pixels(tmp_path, pixels):
    one = pixels[0]
    (tmp_path / "a.png").write_bytes(png(one))
    for item in (
        one, png(one), Image.fromarray(one), tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": png(one)},
    ):  # fmt: skip
        np.testing.assert_array_equal(decode(item, 8), one)


def test_grey_is_repeated_and_clear_becomes_white(pixels):
    grey = pixels[0, ..., 0]
    for form in (grey, grey[..., None], png(grey)):
        np.testing.assert_array_equal(decode(form, 8), np.repeat(grey[..., None], 3, axis=-1))
    clear = np.dstack([pixels[0], np.zeros((8, 8), np.uint8)])
    assert (decode(clear, 8) == 255).all()
    solid = np.dstack([pixels[0], np.full((8, 8), 255, np.uint8)])
    np.testing.assert_array_equal(decode(solid, 8), pixels[0])


def test_other_shapes_are_cropped_in_the_middle():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    assert (decode(wide, 8) == 200).all()


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (b"no picture", "photo cannot be read as a picture"),
        (3, "photo is int; give a path"),
        (np.zeros((2, 2, 3)), "must be a uint8 array"),
        (Image.new("I", (4, 4)), "mode I, whose range is not known"),
        ("absent.png", "photo cannot be read"),
    ],
)
def test_what_is_no_picture_is_named(item, said):
    with pytest.raises(InputError, match=said):
        decode(item, 8, "photo")


def test_a_cut_off_file_is_refused(pixels):
    with pytest.raises(InputError, match="cannot be read"):
        decode(png(pixels[0])[:60], 8)


def test_folders_rows_lines_and_tables_agree(tmp_path, folder):
    import pyarrow
    from pyarrow import parquet

    wanted = read_pictures(folder, 8)
    assert wanted.classes == ("ant", "cat")
    assert wanted.labels.tolist() == [0, 0, 0, 1, 1, 1]
    files = [file for kind in ("ant", "cat") for file in sorted((folder / kind).iterdir())]
    rows = [{"image": file.read_bytes(), "label": file.parent.name} for file in files]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    lines = [{"image": str(file.relative_to(tmp_path)), "label": file.parent.name} for file in files]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cache = tmp_path / "cache"
    for source in (rows, tmp_path / "set.parquet", tmp_path / "set.jsonl"):
        for _ in range(2):  # the second time from the cache
            found = read_pictures(source, 8, cache=cache)
            np.testing.assert_array_equal(found.pixels, wanted.pixels)
            np.testing.assert_array_equal(found.labels, wanted.labels)
            assert found.classes == wanted.classes


def test_a_broken_picture_is_refused_or_skipped(folder):
    (folder / "ant" / "0.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"0\.png cannot be read"):
        read_pictures(folder, 8)
    found = read_pictures(folder, 8, bad="skip")
    assert len(found) == 5
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(found.skipped) == 1
    assert "0.png" in found.skipped[0]


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        (["a", None], None, "1 of 2 pictures have no label, the first at 1"),
        (["a", "b"], ["a"], "class 'b' is not among the 1 classes"),
    ],
)
def test_labels_that_do_not_fit(pixels, labels, classes, said):
    rows = [{"image": pixels[n], "label": label} for n, label in enumerate(labels)]
    with pytest.raises(InputError, match=said):
        read_pictures(rows, 8, classes=classes)


def test_numbers_keep_their_order_and_no_labels_are_none(pixels):
    rows = [{"image": pixels[n], "label": label} for n, label in enumerate([10, 2, 10])]
    assert read_pictures(rows, 8).classes == ("2", "10")
    assert read_pictures([{"image": pixels[0]}], 8).labels is None


def slow_crop(pixels, rng, padding, flip):
    """np.pad, one picture at a time."""
    B, H, W, _ = pixels.shape
    down, right = rng.integers(-padding, padding + 1, B), rng.integers(-padding, padding + 1, B)
    turned = rng.random(B) < 0.5 if flip else np.zeros(B, bool)
    wide = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    out = []
    for n in range(B):
        cut = wide[n, padding + down[n] : padding + down[n] + H, padding + right[n] : padding + right[n] + W]
        out.append(cut[:, ::-1] if turned[n] else cut)
    return np.stack(out)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(0, 4), st.booleans(), st.integers(5, 7), st.integers(5, 9))
def test_augmentation_equals_its_slow_twin(seed, padding, flip, height, width):
    given_pixels = np.random.default_rng(1).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    fast = crop_and_flip(given_pixels, np.random.default_rng(seed), padding, flip)
    np.testing.assert_array_equal(fast, slow_crop(given_pixels, np.random.default_rng(seed), padding, flip))


@pytest.mark.parametrize(
    ("backbone", "pooling"),
    [(RESNET, "avg"), (RESNET, "max"), (RESNET, "gem"), (VIT, "cls"), (VIT, "avg"), (CONVNEXT, "gem"), (DINO, "cls")],
)
def test_folders_give_the_same_bits(tmp_path, pixels, backbone, pooling):
    torch.manual_seed(1)
    made = ImageEncoder(Network(NetworkConfig(backbone, width=12, size=8, pooling=pooling)))
    made.save(tmp_path / "model")
    write_card(tmp_path / "model", Card("model", Nesting([4, 12])))
    model = load(tmp_path / "model")
    assert model.nesting == Nesting([4, 12])
    np.testing.assert_array_equal(model.encoder.vectors(pixels), made.vectors(pixels))
    np.testing.assert_allclose(model.encode(pixels, width=4), truncate(made.vectors(pixels), 4), rtol=1e-6)


def test_gem_lies_between_mean_and_maximum():
    hidden = torch.rand(2, 5, 3, 3)
    pooled = [Network(NetworkConfig(RESNET, pooling=kind)).pool(hidden) for kind in ("avg", "gem", "max")]
    assert (pooled[0] <= pooled[1]).all()
    assert (pooled[1] <= pooled[2]).all()


def test_pretrained_folders_keep_their_weights(tmp_path):
    network = Network(NetworkConfig(VIT, size=8))
    network.backbone.save_pretrained(tmp_path / "vit")
    again = pretrained(tmp_path / "vit", size=8)
    for name, value in network.backbone.state_dict().items():
        torch.testing.assert_close(again.backbone.state_dict()[name], value, rtol=0, atol=0)
    ImageEncoder(again).save(tmp_path / "model")
    found = ImageEncoder.load(tmp_path / "model")
    some = np.zeros((1, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(found.vectors(some), ImageEncoder(again).vectors(some))


def test_model_says_what_it_takes(encoder, pixels):
    model = Model(encoder, Card("images"))
    np.testing.assert_allclose(model.encode(pixels), model.encode([png(x) for x in pixels]), atol=1e-6)
    assert model.encode([]).shape == (0, 16)
    with pytest.raises(InputError, match="list of pictures, got one str"):
        model.encode("a.png")
    with pytest.raises(InputError, match=r"\(N, H, W, 3\), got \(8, 8, 3\)"):
        model.encode(pixels[0])
    with pytest.raises(InputError, match=r"inputs\[1\] cannot be read"):
        model.encode([pixels[0], b"broken"])
    with pytest.raises(InputError, match=r"inputs\[0\] must be text"):
        load("toy").encode([pixels[0]])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pooling": "sum"}, "pooling must be one of"),
        ({"stem": "huge"}, "stem must be one of"),
        ({"width": 0}, "width must be at least 1"),
        ({"backbone": {}}, "backbone needs model_type"),
        ({"backbone": VIT, "stem": "small"}, "is for resnet, not for vit"),
    ],
)
def test_configurations_are_checked(fields, said):
    with pytest.raises(InputError, match=said):
        NetworkConfig(**{"backbone": RESNET, **fields})


def test_unknown_backbones_and_cls_of_maps(pixels):
    with pytest.raises(InputError, match="transformers cannot build"):
        Network(NetworkConfig({"model_type": "nothing-like-it"}))
    with pytest.raises(InputError, match="pooling cls needs a token model"):
        ImageEncoder(Network(NetworkConfig(RESNET, pooling="cls", size=8))).vectors(pixels)


def test_damaged_folders_are_told(tmp_path, encoder):
    with pytest.raises(InputError, match=r"no image\.json"):
        ImageEncoder.load(tmp_path)
    encoder.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DamagedError, match="cannot be read"):
        ImageEncoder.load(tmp_path)
