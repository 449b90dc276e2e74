"""Where every judged document stands, at every width, from one pass over the scores.

A chunk of queries is scored at all widths while its scores lie in the cache, and only ranks leave it: nothing of size
queries x documents is ever held. Several threads take chunks in turn, each with its own buffers and a BLAS of one
thread: the passes after the product then use every core, and no product waits at a barrier for a core that is busy.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.gram import PrefixProducts, refuse_bad_rows, rows_per_chunk
from matryo.core.metrics import Judgements, ranks_in_row
from matryo.core.records import Retrieval

Ints = NDArray[np.int64]
Float32s = NDArray[np.float32]

NEVER = np.iinfo(np.int64).max
"""The rank of a document that was never scored: beyond every cut, as trec_eval takes a document missing from a run."""

MOST_THREADS = 8
"""More than this gain nothing: the passes are then bound by memory."""


def ranks_at_widths(
    queries_QD: Float32s,
    documents_ND: Float32s,
    judged: Judgements,
    widths: Sequence[int],
    *,
    chunk: int | None = None,
    threads: int | None = None,
) -> dict[int, Ints]:
    """Rank (0 = best) of each judged document among all documents, by the cosine of the prefixes, at each width.

    Ties go to the lower position, as in `top_k`. One product of full width serves all widths.

    Args:
        queries_QD: (Q, D) float32, one row per judged query, Q = judged.count; any row lengths.
        documents_ND: (N, D) float32; any row lengths, a zero prefix scores 0.
        judged: which documents are relevant to which query.
        widths: strictly rising, inside 1..D.
        chunk: query rows at a time; the default keeps a chunk's scores near 2 MB. Ranks do not depend on it.
        threads: the default is one per core this process may use, 8 at most, or 1 where BLAS cannot be told to stay
            on one thread (threadpoolctl is not installed).

    Returns:
        width -> (pairs,) int64, in the order of `judged`; give it to `metrics.measure`.

    Raises:
        InputError: shapes that do not fit, a row with NaN or Inf (named), widths out of order or range.
    """
    queries = _matrix(queries_QD, "queries")
    documents = _matrix(documents_ND, "documents")
    if len(queries) != judged.count:
        raise InputError(f"there are {judged.count} judged queries but {len(queries)} query vectors")
    if judged.documents.max() >= len(documents) or judged.documents.min() < 0:
        raise InputError(f"the judgements name document {judged.documents.max()} but there are {len(documents)}")
    refuse_bad_rows(np.einsum("qd,qd->q", queries, queries, dtype=np.float64), "queries")
    products = PrefixProducts(documents, widths)
    if queries.shape[1] != products.full:
        raise InputError(f"queries have {queries.shape[1]} dimensions and documents {products.full}; encode both alike")
    rows = rows_per_chunk(len(documents), chunk)
    work = _Ranker(products, queries, judged)
    starts = range(0, len(queries), rows)
    with _one_blas_thread() as apart:
        wanted = threads or (min(_cores(), MOST_THREADS) if apart else 1)
        workers = min(wanted, len(starts))
        if workers == 1:
            work.run(starts, rows)
        else:
            with ThreadPoolExecutor(workers) as pool:
                for finished in [pool.submit(work.run, starts[n::workers], rows) for n in range(workers)]:
                    finished.result()
    return work.ranks


def ranks_in_task(
    task: Retrieval, queries_QD: Float32s, documents_MD: Float32s, widths: Sequence[int]
) -> dict[int, Ints]:
    """`ranks_at_widths` of a retrieval set whose blank documents have no vector: those stand at NEVER.

    `documents_MD` holds one row for each of `task.texts`.
    """
    judged = task.judged
    if len(task.written) == len(task.documents):
        return ranks_at_widths(queries_QD, documents_MD, judged, widths)
    place = np.full(len(task.documents), -1)
    place[task.written] = np.arange(len(task.written))
    scored = place[judged.documents] >= 0
    # Queries whose every relevant document is blank drop out; the others are numbered anew.
    kept, queries = np.unique(judged.queries[scored], return_inverse=True)
    ranks = {width: np.full(len(judged.queries), NEVER) for width in widths}
    if len(kept):
        part = Judgements(queries, place[judged.documents[scored]], judged.grades[scored], len(kept))
        for width, found in ranks_at_widths(queries_QD[kept], documents_MD, part, widths).items():
            ranks[width][scored] = found
    return ranks


class _Ranker:
    """Ranks chunks of queries; threads write to disjoint parts of `ranks`.

    Queries are taken in the order of their first judged document. In a chunk the judged columns then lie close
    together, so that "at least as good" is asked of the columns left of them, "better" of those right of them, and only
    the narrow strip between needs both: the tie-break costs one comparison per score, not two.
    """

    def __init__(self, products: PrefixProducts, queries: Float32s, judged: Judgements) -> None:
        self._products = products
        first = np.flatnonzero(np.r_[True, judged.queries[1:] != judged.queries[:-1]])
        order = np.argsort(judged.documents[first], kind="stable")
        self._queries = queries[order]
        self._pairs = first[order]
        self._ends = np.r_[first[1:], len(judged.queries)][order]
        self._documents = judged.documents
        self.ranks = {w: np.empty(len(judged.queries), np.int64) for w in products.widths}

    def run(self, starts: Sequence[int], rows: int) -> None:
        """Rank the chunks that begin at `starts`."""
        for start in starts:
            part = slice(start, start + rows)
            pairs, ends = self._pairs[part], self._ends[part]
            count = _counter(self._documents[pairs], self._products.count)
            more = [(row, slice(a + 1, b)) for row, (a, b) in enumerate(zip(pairs, ends, strict=True)) if b - a > 1]
            for _, width, scores in self._products.scores(self._queries[part], rows):
                ranks = self.ranks[width]
                ranks[pairs] = count(scores)
                for row, others in more:
                    ranks[others] = ranks_in_row(scores[row], self._documents[others])


def _counter(columns: Ints, documents: int) -> Callable[[Float32s], list[int]]:
    """A function from scores (R, N) to the rank, in each row r, of column `columns[r]`; `columns` rise."""
    left, right = int(columns[0]), int(columns[-1]) + 1
    rows = np.arange(len(columns))
    earlier = np.arange(left, right) < columns[:, None]
    beaten = np.empty((len(columns), documents), dtype=np.bool_)

    def count(scores: Float32s) -> list[int]:
        own = scores[rows, columns][:, None]
        np.greater_equal(scores[:, :left], own, out=beaten[:, :left])
        np.greater(scores[:, right:], own, out=beaten[:, right:])
        strip = scores[:, left:right]
        tied = strip == own
        tied &= earlier
        inside = np.greater(strip, own, out=beaten[:, left:right])
        inside |= tied
        # Row by row: numpy counts one contiguous row of booleans many times faster than it counts along an axis.
        return [int(np.count_nonzero(row)) for row in beaten]

    return count


def _matrix(vectors: Float32s, name: str) -> Float32s:
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise InputError(f"{name}: expected (N, D) floating point, got shape {vectors.shape} of {vectors.dtype}")
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_blas_thread() -> Iterator[bool]:
    """Hold BLAS to one thread inside; yields False, changing nothing, where that cannot be done."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        yield False
        return
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield True
