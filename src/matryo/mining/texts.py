"""Distinct texts, and which candidates belong to which anchor and so are never its negatives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.records import Pairs, rows, text_of

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def read_corpus(path: str | Path) -> list[str]:
    """The texts of a table: column `text`, with `title` before it where there is one, as in a retrieval set."""
    texts = []
    for line, row in rows(path):
        text = text_of(path, line, row, "text")
        title = str(row.get("title") or "").strip()
        texts.append(f"{title} {text}" if title else text)
    if not texts:
        raise InputError(f"{path}: no rows; expected a column text")
    return texts


@dataclass(frozen=True)
class Texts:
    """A distinct anchors, C distinct candidates (positives first, then the corpus), and R rows that pair them."""

    anchors: list[str]
    candidates: list[str]
    row_anchor: Ints
    row_positive: Ints
    own: Ints
    """Sorted codes anchor * C + candidate of everything an anchor owns, groups aside."""
    groups: Ints
    """The groups of anchor 0, then those of anchor 1, ...; a text is in the groups of every row it appears in."""
    group_starts: Ints
    """(A + 1,) where each anchor's groups start."""
    in_group: Ints
    """Sorted codes group * C + candidate."""

    @classmethod
    def of(cls, pairs: Pairs, corpus: Sequence[str] = ()) -> "Texts":
        """Number the texts of pairs and corpus.

        An anchor owns its own text, the positives of all its rows, and, since a pair may be read either way, the
        anchors of the rows in which it is the positive.
        """
        anchor_at = {text: n for n, text in enumerate(dict.fromkeys(pairs.anchors))}
        candidate_at = {text: n for n, text in enumerate(dict.fromkeys([*pairs.positives, *corpus]))}
        many = len(candidate_at)
        anchor_R = _places(pairs.anchors, anchor_at)
        positive_R = _places(pairs.positives, candidate_at)
        # The same texts in the other part, -1 where they do not play it.
        swapped_anchor_R = _places(pairs.positives, anchor_at)
        swapped_positive_R = _places(pairs.anchors, candidate_at)
        own = np.hstack(
            [(anchor_R, positive_R), (anchor_R, swapped_positive_R), (swapped_anchor_R, swapped_positive_R)]
        )
        own = own[:, (own >= 0).all(axis=0)]
        rows = np.arange(len(pairs) if pairs.groups else 0)
        group_R = np.unique(pairs.groups or [], return_inverse=True)[1]
        of_anchor = np.hstack([(anchor_R[rows], group_R), (swapped_anchor_R[rows], group_R)])
        anchor, groups = np.unique(of_anchor[:, of_anchor[0] >= 0], axis=1)
        in_group = np.hstack([(group_R, positive_R[rows]), (group_R, swapped_positive_R[rows])])
        group, candidate = in_group[:, in_group[1] >= 0]
        return cls(
            list(anchor_at),
            list(candidate_at),
            anchor_R,
            positive_R,
            np.unique(own[0] * many + own[1]),
            groups,
            np.searchsorted(anchor, np.arange(len(anchor_at) + 1)),
            np.unique(group * many + candidate),
        )

    def owned(self, anchors_Q: Ints, candidates_QK: Ints) -> Bools:
        """(Q, K) True where the candidate belongs to the anchor: its own text, its positive, or a group they share."""
        many = len(self.candidates)
        mask_QK = _among(self.own, anchors_Q[:, None] * many + candidates_QK)
        starts_Q = self.group_starts[anchors_Q]
        counts_Q = self.group_starts[anchors_Q + 1] - starts_Q
        for n in range(counts_Q.max(initial=0)):
            rows = np.flatnonzero(counts_Q > n)
            group = self.groups[starts_Q[rows] + n]
            mask_QK[rows] |= _among(self.in_group, group[:, None] * many + candidates_QK[rows])
        return mask_QK


def _places(texts: Sequence[str], at: dict[str, int]) -> Ints:
    """The number of each text, -1 for one that has none."""
    return np.array([at.get(text, -1) for text in texts], np.int64)


def _among(sorted_codes: Ints, codes: Ints) -> Bools:
    """Membership in a sorted list, without sorting it again for every block."""
    place = np.minimum(np.searchsorted(sorted_codes, codes), len(sorted_codes) - 1)
    found: Bools = sorted_codes[place] == codes
    return found
