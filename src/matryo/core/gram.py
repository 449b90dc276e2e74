"""Scores of every prefix from one full-width product.

For widths d_1 < ... < d_L the un-normalised product of prefix l is that of prefix l-1 plus one block of columns, and
squared norms add up the same way. So scoring Q queries against N documents at ALL widths costs one product of full
width, plus one cheap scaling per width.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.prefix import check_width

Float32s = NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 19
"""Scores held at a time: 2 MB of float32, so that the passes after the product read a cache and not memory."""


def check_widths(widths: Sequence[int], full: int) -> list[int]:
    """Widths as a strictly rising list inside 1..full, or an InputError."""
    got = [check_width(w, full) for w in widths]
    if not got or any(a >= b for a, b in itertools.pairwise(got)):
        raise InputError(f"widths must rise strictly and not be empty, got {list(widths)}")
    return got


class PrefixProducts:
    """Documents made ready to be scored at several widths: blocks of columns, and 1/norm of every prefix.

    Norms are summed block by block in float64, which reads the documents once, not once per width. The blocks are
    views: the documents are neither copied nor changed. Several threads may read at once, each with its own generator.

    Args:
        documents_ND: (N, D) float32, N >= 1, finite, any row lengths; a zero prefix scores 0 against everything.
        widths: strictly rising, inside 1..D.

    Raises:
        InputError: widths out of order or range; a row with NaN or Inf, which is named.
    """

    def __init__(self, documents_ND: Float32s, widths: Sequence[int]) -> None:
        self.full = documents_ND.shape[1]
        self.widths = check_widths(widths, self.full)
        self.count = len(documents_ND)
        self._blocks: list[Float32s] = []
        self._scales: list[Float32s] = []
        squares = np.zeros(self.count)
        for a, b in zip([0, *self.widths[:-1]], self.widths, strict=True):
            block = documents_ND[:, a:b]
            squares += np.einsum("nd,nd->n", block, block, dtype=np.float64)
            lengths = np.sqrt(squares)
            scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
            self._blocks.append(block.T)
            self._scales.append(scale.astype(np.float32))
        refuse_bad_rows(squares, "documents")

    def scores(self, queries_QD: Float32s, chunk: int) -> Iterator[tuple[slice, int, Float32s]]:
        """Yield (rows, width, scores_RN) for `chunk` query rows at a time; see `prefix_scores`."""
        if queries_QD.shape[1] != self.full:
            raise InputError(
                f"queries have {queries_QD.shape[1]} dimensions and documents {self.full}; encode both alike"
            )
        gram, scores = np.empty((2, min(chunk, len(queries_QD)), self.count), np.float32)
        for start in range(0, len(queries_QD), chunk):
            part = queries_QD[start : start + chunk]
            where = slice(start, start + len(part))
            sums, out = gram[: len(part)], scores[: len(part)]
            done = 0
            for width, block, scale in zip(self.widths, self._blocks, self._scales, strict=True):
                if done == 0:
                    np.matmul(part[:, :width], block, out=sums)
                else:
                    np.matmul(part[:, done:width], block, out=out)
                    np.add(sums, out, out=sums)
                np.multiply(sums, scale, out=out)
                yield where, width, out
                done = width


def prefix_scores(
    queries_QD: Float32s, documents_ND: Float32s, widths: Sequence[int], chunk: int | None = None
) -> Iterator[tuple[slice, int, Float32s]]:
    """Yield (rows, width, scores_RN): cosine scores up to a positive factor per query, which leaves ranks as they are.

    Chunks of query rows come in order, and inside a chunk the widths rise. The scores buffer is reused: read it before
    taking the next item. Multiply row q by 1/norm of the query's prefix to get cosines.

    Args:
        queries_QD, documents_ND: float32, any row lengths; a zero prefix scores 0 against everything.
        widths: rising, inside 1..D.
        chunk: query rows at a time, >= 1; by default as many as keep the buffer near 2 MB.
    """
    products = PrefixProducts(documents_ND, widths)
    return products.scores(queries_QD, rows_per_chunk(len(documents_ND), chunk))


def rows_per_chunk(documents: int, chunk: int | None = None) -> int:
    """How many query rows are scored at a time against so many documents."""
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    return chunk or max(1, CHUNK_ELEMENTS // max(1, documents))


def refuse_bad_rows(squares_N: NDArray[np.float64], name: str) -> None:
    """Raise an InputError that names the first row whose squared length is not finite."""
    bad = np.flatnonzero(~np.isfinite(squares_N))
    if len(bad):
        raise InputError(f"{name}: row {bad[0]} holds NaN or Inf; remove it or encode it again")
