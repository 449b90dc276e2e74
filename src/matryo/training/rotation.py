"""A start for encoders that were never nested: turn their vectors, so that a prefix begins with what matters most.

The dimensions of an ordinary encoder stand in no order, and a cut of it throws away a random share of what it knows. An
orthogonal map after it changes no inner product of full vectors. Two are made here: principal axes put the directions
of largest variance first; learned ones minimise a nested loss over vectors that are encoded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import Tensor, nn

from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.losses import nested_distill

SAMPLE = {"pca": 8192, "learned": 65536}
"""Texts that axes are computed from."""
NEXT_TO_NONE = 1e-9
"""A divergence whose logarithm need not fall further."""
FEWEST = 256
"""Rows that are neighbours of each other: texts of one kind, or of one field."""


@dataclass(frozen=True)
class Learning:
    """How axes are learned."""

    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 0.01
    warmup: int = 20


def add_rotation(
    model: SentenceTransformer,
    columns: Sequence[Sequence[str]],
    how: Literal["pca", "learned"] = "pca",
    nesting: Nesting | None = None,
    seed: int = 0,
    bfloat16: bool = False,
) -> None:
    """Put a rotation into a model: into a static table itself, else as a linear layer at the end.

    Args:
        model: changed in place; its full-width cosines stay as they are, up to rounding.
        columns: what it will be trained on, columns of texts whose rows belong together; an even sample of the rows is
            encoded. Empty leaves the axes as they are, for weights that are about to be loaded.
        how: "pca", or "learned" for `nesting`.
        nesting: widths and weights that axes are learned for; needed for "learned".
        seed: of the batches that axes are learned from.
        bfloat16: whether the sample is encoded in mixed precision.

    Raises:
        InputError: axes are to be learned for no widths.
    """
    width = int(model.get_embedding_dimension() or 0)
    axes = torch.eye(width)
    if columns:
        every = -(-len(columns[0]) * len(columns) // SAMPLE[how])
        vectors = [_encoded(model, column[::every], bfloat16) for column in columns]
        if how == "pca":
            axes = torch.from_numpy(principal_axes(np.concatenate(vectors)))
        elif nesting is None:
            raise InputError("axes are learned for widths; give a nesting, or take principal axes (pca)")
        else:
            axes = torch.from_numpy(learned_axes(vectors, nesting, seed=seed))
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


def _encoded(model: SentenceTransformer, texts: Sequence[str], bfloat16: bool) -> NDArray[np.float32]:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        found: Tensor = model.encode(list(texts), batch_size=64, show_progress_bar=False, convert_to_tensor=True)
    vectors: NDArray[np.float32] = found.float().cpu().numpy()
    return vectors


def principal_axes(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """(D, D) float32, orthonormal rows: eigenvectors of the covariance of (N, D) vectors, largest variance first.

    The sign of each is chosen so that its largest entry is positive, as linear algebra libraries leave it open.
    """
    centred = vectors_ND.astype(np.float64) - vectors_ND.mean(axis=0, dtype=np.float64)
    _, columns = np.linalg.eigh(centred.T @ centred)
    axes = columns.T[::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return np.ascontiguousarray(axes * np.sign(largest), dtype=np.float32)


def learned_axes(
    columns_ND: Sequence[NDArray[np.float32]], nesting: Nesting, *, how: Learning = Learning(), seed: int = 0
) -> NDArray[np.float32]:
    """(D, D) float32, orthonormal rows whose prefixes say most of what whole vectors say about each other.

    At each width below D, the loss is the divergence (KL) of a prefix's softmax over the other vectors of a batch from
    that of whole vectors: `matryo.losses.nested_distill(kind="neighbours")`. A model teaches its own prefixes, so they
    keep what it knows of texts that are not in the data; a contrast of partners in place of it fits the data better and
    other texts worse. Batches are neighbours: a loss over all kinds of text at once spends the narrow widths on telling
    the kinds apart, as principal axes do. Logarithms are added, as divergences shrink with width: what a width gains
    counts in proportion, or the narrowest would decide alone.

    The rotation is Cayley's (I + A)^-1 (I - A) of a skew-symmetric A that starts at 0, so that axes which need no
    change stay as the model has them. A step costs O(D^3).

    Args:
        columns_ND: columns of unit vectors; those of a row belong together, and come into a batch together.
        nesting: widths and weights; the full width has nothing to learn.
        how: steps, rows of a batch, rate.
        seed: of the batches.
    """
    columns = [torch.from_numpy(np.ascontiguousarray(column, np.float32)) for column in columns_ND]
    width = columns[0].shape[1]
    below = [(w, weight) for w, weight in zip(nesting.widths, nesting.weights, strict=True) if w < width and weight]
    if not below:
        return np.eye(width, dtype=np.float32)
    weights = torch.tensor([weight for _, weight in below])
    rng = np.random.default_rng(seed)
    parts = neighbourhoods(np.sum(columns_ND, axis=0), FEWEST)
    upper_DD = nn.Parameter(torch.zeros(width, width))
    optimizer = torch.optim.Adam([upper_DD])
    for step in range(how.steps):
        rows = torch.from_numpy(rng.permutation(parts[step % len(parts)])[: how.batch_size])
        whole_BD = torch.cat([column[rows] for column in columns])
        turned_BD = whole_BD @ _cayley(upper_DD).T
        divergences = [
            nested_distill(turned_BD[:, :d], whole_BD, nesting=Nesting([d]), kind="neighbours") for d, _ in below
        ]
        loss = (weights * torch.stack(divergences).clamp_min(NEXT_TO_NONE).log()).sum()
        rate = how.learning_rate * min((step + 1) / how.warmup, 1) * (1 - step / how.steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        return _cayley(upper_DD.double()).float().numpy()


def _cayley(upper_DD: Tensor) -> Tensor:
    """The orthogonal matrix of the entries above a diagonal."""
    skew_DD = upper_DD.triu(1) - upper_DD.triu(1).T
    identity_DD = torch.eye(len(skew_DD), dtype=skew_DD.dtype)
    turn_DD: Tensor = torch.linalg.solve(identity_DD + skew_DD, identity_DD - skew_DD)
    return turn_DD


def neighbourhoods(vectors_ND: NDArray[np.float32], fewest: int) -> list[NDArray[np.intp]]:
    """Row numbers in parts of `fewest` to twice as many, cut in halves along the widest axis of each."""
    parts = [np.arange(len(vectors_ND))]
    while len(parts[0]) >= 2 * fewest:
        halves = []
        for part in parts:
            rows = vectors_ND[part] - vectors_ND[part].mean(axis=0)
            _, columns = np.linalg.eigh(rows.T @ rows)
            order = part[np.argsort(rows @ columns[:, -1], kind="stable")]
            halves += [order[: len(order) // 2], order[len(order) // 2 :]]
        parts = halves
    return parts
