"""Mining against a brute-force twin in Python sets and float64, and against sentence-transformers where the two agree.

Vectors of +-1 at widths 4 and 16 have prefixes of length 2 and 4: their cosines are exact in float32, full of ties, and
so the twin must agree to the last position, ties included.
"""

import json
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

import matryo as mt
from matryo.core.errors import InputError
from matryo.core.records import Pairs, read_pairs
from matryo.encoders import Card, Model
from matryo.mining import Mining, mine, search
from matryo.mining.search import hard_negatives
from matryo.mining.texts import Texts

WIDTHS = (4, 16)
MARGINS = [{}, *({"margin": m} for m in (0, 0.25, 0.3, 1.0)), *({"relative_margin": f} for f in (0.5, 0.95, 1))]
NAMES = [f"t{n}" for n in range(14)]


def vector(text: str) -> np.ndarray:
    return np.random.default_rng(int(text[1:])).choice([-1.0, 1.0], 16)


def cosine(a: str, b: str, width: int) -> float:
    return float(vector(a)[:width] @ vector(b)[:width]) / width


def own(anchor: str, pairs: Pairs) -> set[str]:
    """What the anchor may never get, by the words of the documents."""
    rows = list(zip(pairs.anchors, pairs.positives, pairs.groups or [None] * len(pairs), strict=True))
    mine_too = {anchor} | {p for a, p, _ in rows if a == anchor} | {a for a, p, _ in rows if p == anchor}
    groups = {g for a, p, g in rows if anchor in (a, p)} - {None}
    return mine_too | {text for a, p, g in rows if g in groups for text in (a, p)}


def limit(positive: float, options: Mining) -> float:
    if options.margin is not None:
        return positive - options.margin
    return positive - abs(positive) * (1 - (options.relative_margin or 0.95))


def twin(anchor: str, pairs: Pairs, candidates: list[str], width: int, options: Mining) -> tuple[list[str], int]:
    """All negatives of an anchor that the options allow, hardest first, and the number of false negatives."""
    lowest = min(cosine(a, p, width) for a, p in zip(pairs.anchors, pairs.positives, strict=True) if a == anchor)
    others = [c for c in candidates if c not in own(anchor, pairs)]
    others.sort(key=lambda c: (-cosine(anchor, c, width), candidates.index(c)))
    first, last = options.ranks
    window = others[first - 1 : last]
    fit = [c for c in window if cosine(anchor, c, width) <= limit(lowest, options)]
    return fit, len(window) - len(fit)


@st.composite
def cases(draw):
    text = st.sampled_from(NAMES)
    rows = draw(st.lists(st.tuples(text, text), min_size=1, max_size=12))
    groups = draw(st.none() | st.lists(st.sampled_from("abcdef"), min_size=len(rows), max_size=len(rows)))
    pairs = Pairs([a for a, _ in rows], [p for _, p in rows], groups=groups)
    margin = draw(st.sampled_from(MARGINS))
    negatives = draw(st.integers(1, 4))
    first = draw(st.integers(1, 4))
    last = draw(st.none() | st.integers(first + negatives - 1, 14))
    sample = last is not None and draw(st.booleans())
    options = Mining(negatives=negatives, ranks=(first, last), sample=sample, seed=draw(st.integers(0, 3)), **margin)
    return pairs, draw(st.lists(text, max_size=10)), options, draw(st.integers(1, 40)), draw(st.integers(1, 3))


@settings(deadline=None)
@given(cases())
def test_same_as_brute_force(case):
    pairs, corpus, options, block, depth = case
    texts = Texts.of(pairs, corpus)
    vectors = [np.array([vector(t) for t in side], np.float32) * 3 for side in (texts.anchors, texts.candidates)]
    settled = 0

    def advance(more: int) -> None:
        nonlocal settled
        settled += more

    taken = np.full((len(texts.anchors), 0), -1, np.int32)
    for width in WIDTHS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "BLOCK", block)
            patch.setattr(search, "FIRST_DEPTH", depth - 2 * (options.ranks[1] or options.negatives))
            patch.setattr(search, "DEEPER", 2)
            found = hard_negatives(texts, *vectors, width, options, taken, advance)
        for n, anchor in enumerate(texts.anchors):
            fit, false = twin(anchor, pairs, texts.candidates, width, options)
            fit = [c for c in fit if c not in [texts.candidates[t] for t in taken[n] if t >= 0]]
            got = [texts.candidates[p] for p in found.picks[n] if p >= 0]
            if options.sample:
                assert len(got) == len(set(got)) == min(len(fit), options.negatives)
                assert got == [c for c in fit if c in got]
            else:
                assert got == fit[: options.negatives]
            assert found.false[n] == false
        taken = np.concatenate([taken, found.picks], 1)
    assert settled == len(WIDTHS) * len(texts.anchors)


class Signs:
    """The vectors of this file as an encoder."""

    width = 16

    def vectors(self, texts, batch_size, progress):
        return np.array([vector(t) for t in texts], np.float32)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_laws_of_a_mined_file(tmp_path_factory, case):
    """No negative violates the margin, equals a positive or shares a group; they are ordered; none appears twice."""
    pairs, _, options, _, _ = case
    folder = tmp_path_factory.mktemp("laws")
    groups = pairs.groups or [None] * len(pairs)
    rows = [
        {"anchor": a, "positive": p} | ({"group": g} if g else {})
        for a, p, g in zip(pairs.anchors, pairs.positives, groups, strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in NAMES))
    options = replace(options, widths=WIDTHS)
    model = Model(Signs(), Card("signs"))
    try:
        found = mine(model, folder / "pairs.jsonl", folder / "hard.parquet", options, folder / "corpus.jsonl")
    except InputError:  # not one pair has enough
        assert not (folder / "hard.parquet").exists()
        return
    mined = read_pairs(folder / "hard.parquet")
    assert len(mined) == found.rows <= found.pairs == len(pairs)
    column_width = json.loads(pyarrow.parquet.read_schema(folder / "hard.parquet").metadata[b"matryo"])["columns"]
    widths = list(column_width.values())
    for n, anchor in enumerate(mined.anchors):
        negatives = [column[n] for column in mined.negatives]
        assert len(set(negatives)) == len(negatives) == len(WIDTHS) * options.negatives
        assert not own(anchor, pairs) & set(negatives)
        for width in WIDTHS:
            scores = [cosine(anchor, t, width) for t, w in zip(negatives, widths, strict=True) if w == width]
            assert scores == sorted(scores, reverse=True)
            of_anchor = [p for a, p in zip(pairs.anchors, pairs.positives, strict=True) if a == anchor]
            assert all(scores[0] <= limit(cosine(anchor, p, width), options) for p in of_anchor)


@pytest.mark.parametrize("margin", [{"margin": 0.05}, {"relative_margin": 0.9}])
def test_same_as_sentence_transformers_where_the_rules_agree(trained, pairs_file, tmp_path, margin):
    """One width, one positive an anchor, no groups, no depth limit of theirs."""
    pairs = read_pairs(pairs_file)
    assert len(set(pairs.anchors)) == len(set(pairs.positives)) == len(pairs)
    out = tmp_path / "hard.parquet"
    mine(mt.load(trained), pairs_file, out, Mining(negatives=3, **margin))
    ours = read_pairs(out)
    theirs = mine_hard_negatives(
        datasets.Dataset.from_dict({"anchor": pairs.anchors, "positive": pairs.positives}),
        SentenceTransformer(str(trained), device="cpu"),
        absolute_margin=margin.get("margin"),
        relative_margin=None if "margin" in margin else 1 - margin["relative_margin"],
        num_negatives=3,
        range_max=len(pairs) - 1,
        output_format="n-tuple",
        verbose=False,
    )
    assert list(zip(ours.anchors, ours.positives, *ours.negatives, strict=True)) == list(
        zip(*(theirs[name] for name in theirs.column_names), strict=True)
    )
