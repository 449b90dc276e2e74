"""A start for encoders that were never nested: turn their vectors to principal axes, so that a prefix begins as PCA.

The dimensions of an ordinary encoder stand in no order, and a cut of it throws away a random share of what it knows. An
orthogonal map after it changes no inner product of full vectors, and puts the directions of largest variance first.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import nn

SAMPLE = 8192
"""Texts that the axes are computed from."""


def add_rotation(model: SentenceTransformer, texts: Sequence[str], batch_size: int = 64) -> None:
    """Put the rotation to principal axes into a model: into a static table itself, else as a linear layer at the end.

    Args:
        model: changed in place; its full-width cosines stay as they are, up to rounding.
        texts: what it will be trained on; an even sample of them is encoded. Empty leaves the axes as they are, for
            weights that are about to be loaded.
        batch_size: texts encoded at a time.
    """
    width = int(model.get_embedding_dimension() or 0)
    axes = torch.eye(width)
    if texts:
        some = list(texts)[:: -(-len(texts) // SAMPLE)]
        vectors = model.encode(some, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        axes = torch.from_numpy(principal_axes(np.asarray(vectors, np.float32)))
    embedding = getattr(model[0], "embedding", None)
    if len(model) == 1 and embedding is not None:
        with torch.no_grad():
            embedding.weight.copy_(embedding.weight @ axes.T.to(embedding.weight.device))
        return
    layer = Dense(width, width, bias=False, activation_function=nn.Identity(), init_weight=axes).to(model.device)
    last = len(model) - 1 if isinstance(model[len(model) - 1], Normalize) else len(model)
    modules = list(model.children())
    modules.insert(last, layer)
    model._modules.clear()
    for number, module in enumerate(modules):
        model.add_module(str(number), module)


def principal_axes(vectors_ND: np.ndarray) -> np.ndarray:
    """(D, D) float32, orthonormal rows: eigenvectors of the covariance of (N, D) vectors, largest variance first.

    The sign of each is chosen so that its largest entry is positive, as linear algebra libraries leave it open.
    """
    centred = vectors_ND.astype(np.float64) - vectors_ND.mean(axis=0, dtype=np.float64)
    _, columns = np.linalg.eigh(centred.T @ centred)
    axes = columns.T[::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return np.ascontiguousarray(axes * np.sign(largest), dtype=np.float32)
