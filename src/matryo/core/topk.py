"""Top k with one fixed tie-break everywhere: higher score first, then the lower position."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError

Ints = NDArray[np.int64]


def top_k(scores_QN: NDArray[Any], k: int) -> tuple[Ints, NDArray[Any]]:
    """Positions and scores of the k best columns of each row.

    Ties are common at 8 dimensions, in int8 and in binary, so the order among equals is part of the contract: the lower
    position wins, both inside the k and at its edge. Where N < k all N come back.

    Args:
        scores_QN: (Q, N), larger is better, no NaN.
        k: how many, >= 1.

    Returns:
        positions (Q, min(k, N)) int64 and scores of the same shape.
    """
    if scores_QN.ndim != 2:
        raise InputError(f"scores must be (Q, N), got shape {scores_QN.shape}")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    queries, n = scores_QN.shape
    k = min(k, n)
    positions = np.empty((queries, k), dtype=np.int64)
    values = np.empty((queries, k), dtype=scores_QN.dtype)
    for q, row in enumerate(scores_QN):
        if k < n:
            edge = np.partition(row, n - k)[n - k]
            above = np.flatnonzero(row > edge)
            among = np.concatenate([above, np.flatnonzero(row == edge)[: k - len(above)]])
            among.sort()
        else:
            among = np.arange(n)
        if len(among) != k:
            raise InputError(f"row {q} of the scores holds NaN")
        order = np.argsort(-row[among], kind="stable")
        positions[q] = among[order]
        values[q] = row[positions[q]]
    return positions, values
