"""The hard negatives of one width: exact nearest neighbours through faiss, less the anchor's own and what may be true.

Candidates of an anchor, nearest first, fall into three parts:

    own             its own text, its positives, its group: no rank at all
    false negatives score above the limit that the margin sets under the anchor's lowest positive, at this width
    negatives       the rest, hardest first

Ranks count everything that is not the anchor's own. Short prefixes put more in front of the positive than the full
width does, so how deep one must look differs by anchor: all are searched to a modest depth, and those that are not
settled again four times as deep, until they are or the candidates end. No depth guessed in advance cuts anything off.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from matryo.core.prefix import truncate
from matryo.mining.options import Mining
from matryo.mining.texts import Ints, Texts

Float32s = NDArray[np.float32]
Picks = NDArray[np.int32]
BLOCK = 1 << 20
"""Numbers in one working array (anchors x depth, or rows x width); a handful of such arrays is alive at a time."""
FIRST_DEPTH = 32
DEEPER = 4


@dataclass(frozen=True)
class Found:
    """Of each of A anchors at one width."""

    picks: Picks
    """(A, N) candidates, hardest first; -1 where there are too few."""
    false: Ints
    """(A,) how many candidates within the ranks the margin set aside."""


def hard_negatives(
    texts: Texts,
    anchors_AD: Float32s,
    candidates_CD: Float32s,
    width: int,
    options: Mining,
    taken_AT: Picks,
    advance: Callable[[int], None],
) -> Found:
    """The negatives of every anchor at one width.

    Args:
        texts: what belongs to whom.
        anchors_AD, candidates_CD: full-width vectors of the distinct texts, of any length.
        width: prefix to search by.
        options: margin, ranks, number.
        taken_AT: candidates that narrower widths chose already, -1 for none; not chosen again.
        advance: called with the number of anchors just settled.

    Returns:
        Picks and counts. Memory beyond the arguments: the candidates' prefixes, the picks, and a few arrays of BLOCK
        numbers or of C where there are more candidates than that.
    """
    index = faiss.IndexFlatIP(width)
    for rows in _slices(len(candidates_CD), width):
        index.add(np.ascontiguousarray(truncate(candidates_CD[rows], width)))
    limits_A = options.limits(lowest_positives(texts, anchors_AD, candidates_CD, width))
    found = Found(np.full((len(anchors_AD), options.negatives), -1, np.int32), np.zeros(len(anchors_AD), np.int64))
    waiting = np.arange(len(anchors_AD))
    depth = min(len(candidates_CD), FIRST_DEPTH + 2 * (options.ranks[1] or options.negatives))
    while len(waiting):
        left = []
        for rows in _slices(len(waiting), max(depth, width)):
            part = waiting[rows]
            queries = np.ascontiguousarray(truncate(anchors_AD[:, :width][part], width))
            scores_QK, ids_QK = index.search(queries, depth)
            order = np.lexsort((ids_QK, -scores_QK))  # equal scores: the lower position first, as everywhere
            scores_QK = np.take_along_axis(scores_QK, order, 1)
            ids_QK = np.take_along_axis(ids_QK, order, 1)
            block = _Block(part, scores_QK, ids_QK, depth == len(candidates_CD))
            settled = block.settle(texts, limits_A[part], options, width, taken_AT[part], found)
            advance(int(settled.sum()))
            left.append(part[~settled])
        waiting = np.concatenate(left)
        depth = min(len(candidates_CD), depth * DEEPER)
    return found


def lowest_positives(texts: Texts, anchors_AD: Float32s, candidates_CD: Float32s, width: int) -> NDArray[np.float32]:
    """(A,) lowest cosine of each anchor with its positives: no negative may come near any of them."""
    lowest_A = np.full(len(anchors_AD), np.inf, np.float32)
    for rows in _slices(len(texts.row_anchor), width):
        anchors = truncate(anchors_AD[:, :width][texts.row_anchor[rows]], width)
        positives = truncate(candidates_CD[:, :width][texts.row_positive[rows]], width)
        np.minimum.at(lowest_A, texts.row_anchor[rows], np.einsum("rd,rd->r", anchors, positives))
    return lowest_A


@dataclass(frozen=True)
class _Block:
    """The K nearest candidates of Q anchors, nearest first."""

    anchors: Ints
    """(Q,) their numbers."""
    scores: Float32s
    ids: Ints
    everything: bool
    """Whether K is all candidates."""

    def settle(
        self, texts: Texts, limits_Q: NDArray[Any], options: Mining, width: int, taken_QT: Picks, found: Found
    ) -> NDArray[np.bool_]:
        """Write down what these anchors get; (Q,) False for those that must be searched deeper."""
        first, last = options.ranks[0], options.ranks[1] or len(texts.candidates)
        others_QK = ~texts.owned(self.anchors, self.ids)
        if not self.everything:
            # faiss may have cut through candidates of equal score; which of them come first is only known deeper.
            others_QK &= self.scores > self.scores[:, -1:]
        ranks_QK = np.cumsum(others_QK, 1)
        inside_QK = others_QK & (ranks_QK >= first) & (ranks_QK <= last)
        false_QK = inside_QK & (self.scores > limits_Q[:, None])
        fit_QK = inside_QK & ~false_QK
        for taken_Q in taken_QT.T:
            fit_QK &= self.ids != taken_Q[:, None]
        settled_Q = (ranks_QK[:, -1] >= last) | self.everything
        if not options.sample:
            settled_Q |= fit_QK.sum(1) >= options.negatives
        found.false[self.anchors[settled_Q]] = false_QK[settled_Q].sum(1)
        for q in np.flatnonzero(settled_Q):
            anchor = int(self.anchors[q])
            places = np.flatnonzero(fit_QK[q])
            if options.sample and len(places) > options.negatives:
                # Seeded by the anchor, so that neither blocks nor other anchors change what it draws.
                draw = np.random.default_rng((options.seed, width, anchor))
                places = np.sort(draw.choice(places, options.negatives, replace=False))
            places = places[: options.negatives]
            found.picks[anchor, : len(places)] = self.ids[q, places]
        return settled_Q


def _slices(total: int, each: int) -> Iterator[slice]:
    """Slices of rows whose arrays of `each` numbers a row stay within BLOCK."""
    step = max(1, BLOCK // each)
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
