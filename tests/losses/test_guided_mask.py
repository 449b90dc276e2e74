import pytest
import torch
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
from torch import nn

import matryo as mt
from matryo.losses import guided_ignore, nested_guided_info_nce, nested_info_nce


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Lookup(nn.Module):
    """An encoder whose features are the embeddings."""

    def forward(self, features):
        return {"sentence_embedding": features["rows"]}


def gist(margin, relative, contrast_anchors, columns, guide_columns):
    """sentence-transformers' own loss on embeddings; its constructor asks for tokenisers, its forward does not."""
    loss = GISTEmbedLoss.__new__(GISTEmbedLoss)
    nn.Module.__init__(loss)
    loss.model, loss.guide, loss.temperature, loss.must_retokenize = Lookup(), Guide(guide_columns), 0.05, False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    loss.margin, loss.margin_strategy = margin, "relative" if relative else "absolute"
    loss.contrast_anchors, loss.contrast_positives, loss.gather_across_devices = contrast_anchors, False, False
    return loss([{"rows": column} for column in columns], None)


class Guide(nn.Module):
    """Gives its columns in turn."""

    def __init__(self, columns):
        super().__init__()
        self.columns = list(columns)

    def forward(self, features):
        return {"sentence_embedding": self.columns.pop(0)}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.1, -0.1])
@pytest.mark.parametrize("contrast_anchors", [False, True])
@pytest.mark.parametrize("negatives", [False, True])
def test_equals_sentence_transformers_gist_loss(margin, relative, contrast_anchors, negatives):
    count = 3 if negatives else 2
    columns, guides = [[rows(11, d, seed=n + d) for n in range(count)] for d in (16, 7)]
    theirs = gist(margin, relative, contrast_anchors, columns, guides)
    others, guide_others = ([x[1], *([x[0]] if contrast_anchors else []), *x[2:]] for x in (columns, guides))
    ours = nested_guided_info_nce(
        columns[0],
        torch.cat(others),
        guides[0],
        torch.cat(guide_others),
        nesting=mt.Nesting([16]),
        margin=margin,
        relative=relative,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_mask_by_the_formula_whatever_the_chunk(monkeypatch):
    anchors, candidates = rows(9, 6), rows(14, 6, seed=1)
    targets = torch.tensor([3, 0, 13, 7, 7, 2, 5, 1, 9])
    mask = guided_ignore(anchors, candidates, targets=targets, margin=0.05)
    monkeypatch.setattr("matryo.losses.guided.CHUNK_SCORES", 28)
    assert torch.equal(mask, guided_ignore(anchors, candidates, targets=targets, margin=0.05))
    cosines = torch.cosine_similarity(anchors[:, None], candidates[None], dim=-1)
    for i, j in ((i, j) for i in range(9) for j in range(14)):
        expected = j != targets[i] and cosines[i, j] > cosines[i, targets[i]] - 0.05
        assert bool(mask[i, j]) == bool(expected)
    assert 0 < int(mask.sum()) < mask.numel()


def test_rotated_and_scaled_guides_mask_alike():
    anchors, candidates = rows(9, 6), rows(14, 6, seed=1)
    turn = torch.linalg.qr(rows(6, 6, seed=2))[0]
    mask = guided_ignore(anchors, candidates)
    assert torch.equal(mask, guided_ignore(anchors @ turn * 3, candidates @ turn * rows(14, 1, seed=3).abs()))


def test_a_copy_of_the_positive_goes_with_a_margin():
    anchors = rows(3, 8)
    candidates = torch.cat([rows(3, 8, seed=1), rows(3, 8, seed=1)])
    mask = guided_ignore(anchors, candidates, margin=1e-9)
    assert mask[:, 3:].diagonal().all()
    assert not mask[:, :3].diagonal().any()


def test_no_gradient_reaches_the_guide_and_half_precision_is_widened():
    guide = rows(5, 8).float().requires_grad_()
    assert not guided_ignore(guide, guide).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = guided_ignore(guide, guide * 2)
    assert torch.equal(inside, guided_ignore(guide, guide * 2))


def test_a_guide_without_preference_masks_nothing():
    guide = torch.zeros(4, 3)
    assert not guided_ignore(guide, guide).any()
    a, c = rows(4, 8), rows(4, 8, seed=1)
    nesting = mt.Nesting([4, 8])
    plain = nested_info_nce(a, c, nesting=nesting)
    torch.testing.assert_close(nested_guided_info_nce(a, c, guide, guide, nesting=nesting), plain, rtol=0, atol=0)
    masked = nested_guided_info_nce(a, c, guide, guide, nesting=nesting, guide_nesting=mt.Nesting([1, 3]))
    torch.testing.assert_close(masked, plain, rtol=1e-12, atol=0)


ONE, GUIDE = torch.ones(3, 8), torch.ones(3, 4)
FIT = mt.Nesting([4, 8])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: guided_ignore(ONE, GUIDE), r"\(B, E\) .*\(N, E\), got \(3, 8\) and \(3, 4\)"),
        (lambda: guided_ignore(GUIDE, GUIDE[:2]), "3 anchors need at least 3 candidates"),
        (lambda: guided_ignore(GUIDE, GUIDE, targets=torch.tensor([0, 1, 3])), r"lie in 0\.\.2, got 0\.\.3"),
        (lambda: guided_ignore(GUIDE, GUIDE, targets=torch.tensor([0, 1])), r"targets must be \(3,\) integers"),
        (lambda: guided_ignore(GUIDE, GUIDE, margin=float("nan")), "margin must be a finite number, got nan"),
        (
            lambda: guided_ignore(GUIDE, torch.tensor([[1.0], [float("nan")], [1.0]]).expand(3, 4)),
            "row 1 of guide_candidates holds NaN or Inf",
        ),
        (
            lambda: nested_guided_info_nce(ONE, ONE, GUIDE[:2], GUIDE, nesting=FIT),
            "same texts: 3 rows here, 2 of the guide",
        ),
        (
            lambda: nested_guided_info_nce(ONE, ONE, GUIDE, GUIDE, nesting=FIT, guide_nesting=mt.Nesting([4])),
            r"one width for each of \[4, 8\], got \[4\]",
        ),
        (
            lambda: nested_guided_info_nce(ONE, ONE, GUIDE, GUIDE, nesting=FIT, guide_nesting=mt.Nesting([2, 5])),
            "ends at width 5 but the vectors have 4",
        ),
        (
            lambda: nested_guided_info_nce(
                ONE, ONE, GUIDE, GUIDE, nesting=FIT, guide_nesting=mt.Nesting([2, 4]), temperature=[1.0]
            ),
            r"one per width \(2\)",
        ),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
