"""Any sentence-transformers model: its own pooling and steps are kept."""

import re

import numpy as np
import pytest

import matryo as mt
from matryo.core.errors import InputError
from matryo.core.prefix import truncate

TEXTS = ["a puzzle game for the terminal", "mail server", "A longer text, so that padding plays a part in the batch."]


def test_minilm_equals_plain_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    model = mt.load(minilm, device="cpu")
    plain = SentenceTransformer(str(minilm), device="cpu")
    assert model.width == 384
    assert model.nesting is None
    assert [type(module) for module in model.encoder.model][1:] == [Pooling, Normalize]
    assert model.encoder.model[1].get_config_dict() == plain[1].get_config_dict()
    np.testing.assert_allclose(model.encode(TEXTS), plain.encode(TEXTS), atol=1e-6)
    cut = plain.encode(TEXTS, truncate_dim=64, normalize_embeddings=True)
    np.testing.assert_allclose(model.encode(TEXTS, width=64), cut, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS, width=7), truncate(plain.encode(TEXTS), 7), atol=1e-6)
    assert model.encode([]).shape == (0, 384)


def test_name_that_cannot_be_reached_is_one_line():
    with pytest.raises(InputError, match="cannot load model 'matryo-tests/no-such-model'") as caught:
        mt.load("matryo-tests/no-such-model")
    assert "\n" not in str(caught.value)
    assert re.search("a hub name that this machine can reach, or 'toy'", str(caught.value))
