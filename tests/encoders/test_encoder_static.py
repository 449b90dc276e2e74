"""Static models: vectors equal to sentence-transformers', every width a unit prefix, and no torch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import matryo as mt
from matryo.core.codecs import codec
from matryo.core.errors import InputError

TEXTS = ["a puzzle game for the terminal", "Library for reading PNG images", "mail server", "ß, Ünïcode and 漢字 names"]

WITHOUT_TORCH = """
import builtins, sys
import numpy as np

real = builtins.__import__
def refuse(name, *rest, **more):
    if name.split(".")[0] in ("torch", "transformers", "sentence_transformers"):
        raise ImportError(f"{name} is not to be imported")
    return real(name, *rest, **more)
builtins.__import__ = refuse

import json
import matryo as mt
model = mt.load(sys.argv[1])
texts = json.loads(sys.argv[3])
np.savez(sys.argv[2], full=model.encoder.vectors(texts), unit=model.encode(texts), cut=model.encode(texts, width=8))
assert not {"torch", "transformers", "sentence_transformers"} & set(sys.modules)
"""


def test_toy_model_is_deterministic_and_counts_words():
    model = mt.load("toy")
    one, two, other = model.encode(["red apple", "apple RED", "zebra"])
    np.testing.assert_array_equal(one, two)
    assert one @ other < 0.5
    assert model.width == 64
    assert model.nesting == mt.Nesting([8, 16, 32, 64])
    full = model.encoder.vectors(["red apple"])
    assert full.sum() == pytest.approx(2.01)


def test_static_folder_loads_without_torch_and_equals_sentence_transformers(trained, python, tmp_path):
    from sentence_transformers import SentenceTransformer

    made = python("-c", WITHOUT_TORCH, trained, tmp_path / "found.npz", json.dumps(TEXTS))
    assert made.returncode == 0, made.stderr
    plain = SentenceTransformer(str(trained), device="cpu")
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_allclose(found["full"], plain.encode(TEXTS), atol=1e-6)
        np.testing.assert_allclose(found["unit"], plain.encode(TEXTS, normalize_embeddings=True), atol=1e-6)
        np.testing.assert_allclose(
            found["cut"], plain.encode(TEXTS, truncate_dim=8, normalize_embeddings=True), atol=1e-6
        )


def test_every_width_is_the_renormalised_prefix(trained):
    model = mt.load(trained)
    full = model.encoder.vectors(TEXTS).astype(np.float64)
    for width in range(1, model.width + 1):
        rows = model.encode(TEXTS, width=width)
        assert rows.shape == (len(TEXTS), width)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        prefix = full[:, :width]
        np.testing.assert_allclose(rows, prefix / np.linalg.norm(prefix, axis=1, keepdims=True), atol=1e-6)


def test_codes_are_those_of_the_prefix(trained):
    model = mt.load(trained)
    for width in model.nesting.widths:
        unit = model.encode(TEXTS, width=width)
        np.testing.assert_array_equal(model.encode(TEXTS, width=width, code="binary"), np.packbits(unit > 0, axis=1))
        np.testing.assert_array_equal(model.encode(TEXTS, width=width, code="float16"), unit.astype(np.float16))
        store = codec("int8", width).load({"scale": model.card.int8_scales[width]})
        coded = model.encode(TEXTS, width=width, code="int8")
        assert coded.dtype == np.int8
        np.testing.assert_array_equal(coded, store.encode(unit))


def test_rows_keep_their_order_and_an_empty_list_is_fine(trained):
    model = mt.load(trained)
    together = model.encode(TEXTS * 3, batch_size=2)
    np.testing.assert_array_equal(together, np.concatenate([model.encode([text]) for text in TEXTS * 3]))
    assert model.encode([]).shape == (0, model.width)


def test_module_in_a_folder_of_its_own_loads_too(trained, tmp_path):
    """Older sentence-transformers wrote static models as `0_StaticEmbedding/`."""
    folder = shutil.copytree(trained, tmp_path / "older")
    (folder / "0_StaticEmbedding").mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.move(folder / name, folder / "0_StaticEmbedding" / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_StaticEmbedding"
    (folder / "modules.json").write_text(json.dumps(modules))
    np.testing.assert_array_equal(mt.load(folder).encode(TEXTS), mt.load(trained).encode(TEXTS))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": ["good", " \t"]}, r"inputs\[1\] is empty"),
        ({"inputs": ["good", "good", None]}, r"inputs\[2\] must be text, got NoneType"),
        ({"inputs": "one text"}, "list of texts, got one text"),
        ({"width": 0}, r"width 0 is outside 1\.\.64"),
        ({"width": 65}, r"width 65 is outside 1\.\.64"),
        ({"width": -1}, r"width -1 is outside 1\.\.64"),
        ({"width": True}, r"integer in 1\.\.64, got True"),
        ({"width": 8.0}, r"integer in 1\.\.64, got 8\.0"),
        ({"code": "int7"}, "unknown code 'int7'.*float32"),
        ({"code": "int8"}, "no int8 ranges for width 64"),
        ({"code": "binary", "width": 12}, "multiple of 8, got 12; try 8"),
        ({"depth": 3}, "depth 3 was not trained.*only the full depth"),
        ({"batch_size": 0}, "batch_size must be a whole number above 0, got 0"),
    ],
)
def test_bad_input_is_refused_with_its_place_and_value(options, said):
    with pytest.raises(InputError, match=said) as caught:
        mt.load("toy").encode(**{"inputs": ["good"], **options})
    assert "\n" not in str(caught.value)


def test_int8_at_a_width_without_ranges_names_those_there_are(trained):
    with pytest.raises(InputError, match=r"no int8 ranges for width 9 \(it has 8, 16, 32\)"):
        mt.load(trained).encode(TEXTS, width=9, code="int8")


def test_text_without_a_known_token_is_named(trained, tmp_path):
    """Control characters are dropped by the tokeniser, so nothing is left to take the mean of."""
    with pytest.raises(InputError, match=r"only zeros for inputs\[1\] at width 8"):
        mt.load(trained).encode(["mail", "\x00\x01"], width=8)


def test_missing_folder_is_an_input_error():
    for name in (Path("nowhere"), "./nowhere", "/nowhere", "a/b/c"):
        with pytest.raises(InputError, match="no such model folder"):
            mt.load(name)


def test_folder_that_is_no_model_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no modules\.json"):
        mt.load(tmp_path)
