"""Losses on pairs, triplets and teachers against naive loops in float64: same value per width, same gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import matryo as mt
from matryo.losses import (
    nested_angle,
    nested_cosent,
    nested_distill,
    nested_kl,
    nested_margin_mse,
    nested_online_contrastive,
    nested_sigmoid,
    nested_triplet,
)

LIMIT = 1e-9


def unit(x):
    """The definition: divide by the length, a zero row stays zero."""
    return torch.stack([row / row.norm() if bool(row.any()) else row * 0 for row in x])


def cosine(a, b):
    return (a * b).sum()


def pairs_ranked(similarities, scores, scale):
    terms = [torch.zeros((), dtype=torch.float64)]
    for i, high in enumerate(scores.tolist()):
        terms += [scale * (similarities[j] - similarities[i]) for j, low in enumerate(scores.tolist()) if high > low]
    return torch.stack(terms).exp().sum().log()


def slow_cosent(first, second, scores, scale):
    return pairs_ranked([cosine(a, b) for a, b in zip(first, second, strict=True)], scores, scale)


def slow_angle(first, second, scores, scale):
    """Complex numbers, as the paper writes them: the quotient of unit vectors z / w is z conj(w) / |w|^2."""
    half = first.shape[1] // 2
    similarities = []
    for a, b in zip(first, second, strict=True):
        z, w = torch.complex(a[:half], a[half:]), torch.complex(b[:half], b[half:])
        quotient = (z * w.conj()).sum()
        similarities.append((quotient.real + quotient.imag).abs())
    return pairs_ranked(similarities, scores, scale)


def distance(a, b, metric):
    return 1 - cosine(a, b) if metric == "cosine" else (a - b).square().sum().sqrt()


def slow_triplet(anchors, positives, negatives, margin, metric):
    total = 0
    for a, p, n in zip(anchors, positives, negatives, strict=True):
        total = total + torch.clamp(distance(a, p, metric) - distance(a, n, metric) + margin, min=0)
    return total / len(anchors)


def slow_contrastive(first, second, labels, margin, metric):
    distances = [distance(a, b, metric) for a, b in zip(first, second, strict=True)]
    near = [d for d, label in zip(distances, labels.tolist(), strict=True) if label]
    far = [d for d, label in zip(distances, labels.tolist(), strict=True) if not label]
    farthest = max(near) if near else sum(far) / len(far)
    closest = min(far) if far else sum(near) / len(near)
    hard = [d**2 for d in near if d > closest]
    hard += [torch.clamp(margin - d, min=0) ** 2 for d in far if d < farthest]
    return sum(hard) if hard else 0 * distances[0]


def slow_sigmoid(anchors, candidates, scale, bias, keep):
    total = 0
    for i, a in enumerate(anchors):
        for j, c in enumerate(candidates):
            if keep[i, j]:
                sign = 1 if i == j else -1
                total = total - torch.log(1 / (1 + torch.exp(-sign * (scale * cosine(a, c) + bias))))
    return total / len(anchors)


def slow_similarity(student, teacher):
    terms = [
        (cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])) ** 2
        for i in range(len(student))
        for j in range(len(student))
    ]
    return sum(terms) / len(terms)


def slow_kl(queries, candidates, teacher, temperature, teacher_temperature):
    total = 0
    for q, of_query, scores in zip(queries, candidates, teacher, strict=True):
        wanted = (scores / teacher_temperature).exp()
        wanted = wanted / wanted.sum()
        got = torch.stack([cosine(q, c) / temperature for c in of_query]).exp()
        got = got / got.sum()
        total = total + (wanted * (wanted / got).log()).sum()
    return total / len(queries)


def compare(fast, slow, nesting, embeddings, learned=()):
    """`fast(*embeddings, *learned)` gives (total, values); `slow(level, *prefixes, *learned)` the loss of one width."""
    first, second = ([x.clone().requires_grad_() for x in (*embeddings, *learned)] for _ in range(2))
    total, values = fast(*first)
    count = len(embeddings)

    def at(level, width):
        cut = [
            unit(x[..., :width]) if x.ndim == 2 else torch.stack([unit(part[:, :width]) for part in x])
            for x in second[:count]
        ]
        return slow(level, *cut, *second[count:])

    expected = torch.stack([at(level, width) for level, width in enumerate(nesting.widths)])
    torch.testing.assert_close(values, expected.detach(), rtol=LIMIT, atol=LIMIT)
    want = sum(weight * value for weight, value in zip(nesting.weights, expected, strict=True))
    torch.testing.assert_close(total, want, rtol=LIMIT, atol=LIMIT)
    total.backward()
    want.backward()
    for a, b in zip(first, second, strict=True):
        assert bool(torch.isfinite(a.grad).all())
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=LIMIT)


def draw(seed, nesting, *shapes):
    make = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, nesting.D, generator=make, dtype=torch.float64) * (1 + n) for n, shape in enumerate(shapes)
    ]


@st.composite
def nestings(draw, first=1, even=False):
    """`first`: with one dimension every vector is +-1 and distances tie or are 0, where slopes are a choice."""
    blocks = [draw(st.integers(first, 6)), *draw(st.lists(st.integers(1, 6), max_size=3))]
    widths = [sum(blocks[: n + 1]) * (2 if even else 1) for n in range(len(blocks))]
    return mt.Nesting(widths, [0.5 + n for n in range(len(widths))])


SIZES, SEEDS = st.integers(2, 9), st.integers(0, 2**31)
METRICS, MARGINS = st.sampled_from(["cosine", "euclidean"]), st.floats(0.05, 2.0)
CALM = settings(max_examples=30, deadline=None)


@CALM
@given(nesting=nestings(even=True), size=SIZES, seed=SEEDS, levels=st.integers(2, 4), angle=st.booleans())
def test_cosent_and_angle(nesting, size, seed, levels, angle):
    scores = torch.randint(levels, (size,), generator=torch.Generator().manual_seed(seed))  # with ties
    scores[:2] = torch.tensor([0, 1])
    scale = torch.linspace(3, 20, len(nesting), dtype=torch.float64)
    loss, slow = (nested_angle, slow_angle) if angle else (nested_cosent, slow_cosent)
    compare(
        lambda a, b, t: loss(a, b, scores, nesting=nesting, scale=t, per_width=True),
        lambda level, a, b, t: slow(a, b, scores, t[level]),
        nesting,
        draw(seed, nesting, (size,), (size,)),
        (scale,),
    )


@CALM
@given(nesting=nestings(first=2), size=st.integers(1, 9), seed=SEEDS, margin=MARGINS, metric=METRICS)
def test_triplet(nesting, size, seed, margin, metric):
    compare(
        lambda a, p, n: nested_triplet(a, p, n, nesting=nesting, margin=margin, metric=metric, per_width=True),
        lambda _level, a, p, n: slow_triplet(a, p, n, margin, metric),
        nesting,
        draw(seed, nesting, (size,), (size,), (size,)),
    )


@CALM
@given(
    nesting=nestings(first=2),
    size=SIZES,
    seed=SEEDS,
    margin=MARGINS,
    metric=METRICS,
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_online_contrastive(nesting, size, seed, margin, metric, share):
    labels = (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share).long()

    def fast(a, b):
        return nested_online_contrastive(a, b, labels, nesting=nesting, margin=margin, metric=metric, per_width=True)

    def slow(_level, a, b):
        return slow_contrastive(a, b, labels, margin, metric)

    compare(fast, slow, nesting, draw(seed, nesting, (size,), (size,)))


@CALM
@given(
    nesting=nestings(),
    size=st.integers(1, 8),
    extra=st.integers(1, 5),
    seed=SEEDS,
    chunk=st.sampled_from([1, 3, None]),
    masks=st.sets(st.sampled_from(["ignore", "group"])),
    one=st.booleans(),
)
def test_sigmoid(nesting, size, extra, seed, chunk, masks, one):
    make = torch.Generator().manual_seed(seed)
    ignore = torch.rand(size, size + extra, generator=make) < 0.3 if "ignore" in masks else None
    group = torch.randint(-1, 3, (size,), generator=make) if "group" in masks else None
    keep = torch.ones(size, size + extra, dtype=torch.bool)
    for i in range(size):
        for j in range(size + extra):
            same = group is not None and j < size and group[i] == group[j] and group[i] >= 0
            keep[i, j] = i == j or not (same or (ignore is not None and ignore[i, j]))
    scale, bias = torch.linspace(2, 9, len(nesting)).double(), torch.linspace(-9, 1, len(nesting)).double()
    if one:
        scale, bias = scale[0].clone(), bias[0].clone()

    def fast(a, c, t, b):
        options = {"ignore": ignore, "group": group, "chunk": chunk}
        return nested_sigmoid(a, c, nesting=nesting, scale=t, bias=b, per_width=True, **options)

    def slow(level, a, c, t, b):
        return slow_sigmoid(a, c, t if one else t[level], b if one else b[level], keep)

    compare(fast, slow, nesting, draw(seed, nesting, (size,), (size + extra,)), (scale, bias))


@CALM
@given(
    nesting=nestings(),
    size=SIZES,
    seed=SEEDS,
    kind=st.sampled_from(["cosine", "mse", "similarity"]),
    longer=st.booleans(),
    chunk=st.sampled_from([1, 2, None]),
)
def test_distill(nesting, size, seed, kind, longer, chunk):
    teacher = torch.randn(size, nesting.D + 3 * longer, generator=torch.Generator().manual_seed(seed)).double()
    # A longer teacher's prefixes are only taken where it is said to be nested.
    taught = nesting if longer and (kind != "similarity" or seed % 2) else None
    whole = longer and taught is None

    def fast(s):
        options = {"kind": kind, "teacher_nesting": taught, "chunk": chunk}
        return nested_distill(s, teacher, nesting=nesting, per_width=True, **options)

    def slow(_level, s):
        t = unit(teacher if whole else teacher[:, : s.shape[1]])
        if kind == "similarity":
            return slow_similarity(s, t)
        rows = [1 - cosine(a, b) if kind == "cosine" else (a - b).square().sum() for a, b in zip(s, t, strict=True)]
        return sum(rows) / size

    compare(fast, slow, nesting, draw(seed + 1, nesting, (size,)))


@CALM
@given(nesting=nestings(), size=st.integers(1, 9), seed=SEEDS, nested_teacher=st.booleans())
def test_margin_mse(nesting, size, seed, nested_teacher):
    shape = (len(nesting), size) if nested_teacher else (size,)
    margins = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * 9
    scale = torch.linspace(3, 20, len(nesting)).double()

    def slow(level, q, p, n, t):
        wanted = margins[level] if nested_teacher else margins
        errors = [t[level] * (cosine(a, b) - cosine(a, c)) - w for a, b, c, w in zip(q, p, n, wanted, strict=True)]
        return sum(e**2 for e in errors) / size

    compare(
        lambda q, p, n, t: nested_margin_mse(q, p, n, margins, nesting=nesting, scale=t, per_width=True),
        slow,
        nesting,
        draw(seed, nesting, (size,), (size,), (size,)),
        (scale,),
    )


@CALM
@given(nesting=nestings(), size=st.integers(1, 5), count=st.integers(2, 5), seed=SEEDS, nested_teacher=st.booleans())
def test_kl(nesting, size, count, seed, nested_teacher):
    shape = (len(nesting), size, count) if nested_teacher else (size, count)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * 5 + 70  # raw dot products
    temperature = torch.linspace(0.05, 0.2, len(nesting)).double()

    def fast(q, c, t):
        return nested_kl(q, c, scores, nesting=nesting, temperature=t, teacher_temperature=2.0, per_width=True)

    def slow(level, q, c, t):
        return slow_kl(q, c, scores[level] if nested_teacher else scores, t[level], 2.0)

    compare(fast, slow, nesting, draw(seed, nesting, (size,), (size, count)), (temperature,))
