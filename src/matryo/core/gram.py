"""Scores of every prefix from one full-width product.

For widths d_1 < ... < d_L the un-normalised product of prefix l is that of prefix l-1 plus one block of columns, and
squared norms add up the same way. So scoring Q queries against N documents at ALL widths costs one product of full
width, plus one cheap scaling per width.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.prefix import check_width, inverse_norms

Float32s = NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 20
"""Scores held at a time: 4 MB of float32, so that the passes after the product read a cache and not memory."""


def check_widths(widths: Sequence[int], full: int) -> list[int]:
    """Widths as a strictly rising list inside 1..full, or an InputError."""
    got = [check_width(w, full) for w in widths]
    if not got or any(a >= b for a, b in zip(got, got[1:], strict=False)):
        raise InputError(f"widths must rise strictly and not be empty, got {list(widths)}")
    return got


def prefix_scores(
    queries_QD: Float32s, documents_ND: Float32s, widths: Sequence[int], chunk: int | None = None
) -> Iterator[tuple[slice, int, Float32s]]:
    """Yield (rows, width, scores_RN): cosine scores up to a positive factor per query, which leaves ranks as they are.

    Chunks of query rows come in order, and inside a chunk the widths rise. The scores buffer is reused: read it before
    taking the next item. Multiply row q by 1/norm of the query's prefix to get cosines.

    Args:
        queries_QD, documents_ND: float32, any row lengths; a zero prefix scores 0 against everything.
        widths: rising, inside 1..D.
        chunk: query rows at a time; by default as many as keep the buffer near 4 MB.
    """
    full = queries_QD.shape[1]
    if documents_ND.shape[1] != full:
        raise InputError(f"queries have {full} dimensions and documents {documents_ND.shape[1]}; encode both alike")
    widths = check_widths(widths, full)
    n = len(documents_ND)
    rows = chunk or max(1, min(len(queries_QD), CHUNK_ELEMENTS // max(1, n)))
    edges = list(zip([0, *widths[:-1]], widths, strict=True))
    blocks = [np.ascontiguousarray(documents_ND[:, a:b].T) for a, b in edges]
    scales = [inverse_norms(documents_ND[:, :b]).astype(np.float32) for b in widths]
    gram, scores = np.empty((rows, n), np.float32), np.empty((rows, n), np.float32)
    for start in range(0, len(queries_QD), rows):
        part = queries_QD[start : start + rows]
        where = slice(start, start + len(part))
        sums, out = gram[: len(part)], scores[: len(part)]
        for number, (a, b) in enumerate(edges):
            if number == 0:
                np.matmul(part[:, a:b], blocks[0], out=sums)
            else:
                np.matmul(part[:, a:b], blocks[number], out=out)
                np.add(sums, out, out=sums)
            np.multiply(sums, scales[number], out=out)
            yield where, b, out
