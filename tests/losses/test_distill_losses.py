"""Distillation: a student equal to its teacher loses nothing, teachers of any size and any score, lengths not read."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss
from torch.nn.functional import normalize

import matryo as mt
from matryo.losses import nested_distill, nested_kl, nested_margin_mse

KINDS = ["cosine", "mse", "similarity"]
NESTING = mt.Nesting([2, 5, 12], [1.0, 0.5, 2.0])
ONE = mt.Nesting([2, 4])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(11)


def cosines(a, b, widths):
    return torch.stack([(normalize(a[..., :d], dim=-1) * normalize(b[..., :d], dim=-1)).sum(-1) for d in widths])


@pytest.fixture
def rows():
    return torch.randn(5, 9, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_student_equal_to_its_teacher_has_loss_zero_at_every_width(kind, chunk, rows):
    student = rows[0].requires_grad_()
    total, values = nested_distill(student, student, nesting=NESTING, kind=kind, chunk=chunk, per_width=True)
    assert bool((values.abs() <= 1e-12).all())
    total.backward()
    assert float(student.grad.abs().max()) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_not_read(kind, rows):
    student, teacher = rows[:2]
    value = nested_distill(student, teacher, nesting=NESTING, kind=kind)
    longer = torch.arange(1, 10)[:, None]
    torch.testing.assert_close(nested_distill(student * longer, teacher / longer, nesting=NESTING, kind=kind), value)


def test_mse_is_twice_cosine_and_torchs_times_the_width(rows):
    student, teacher = rows[:2]
    _, mse = nested_distill(student, teacher, nesting=NESTING, kind="mse", per_width=True)
    _, cosine = nested_distill(student, teacher, nesting=NESTING, kind="cosine", per_width=True)
    torch.testing.assert_close(mse, 2 * cosine)
    plain = torch.nn.functional.mse_loss(normalize(student), normalize(teacher)) * 12
    torch.testing.assert_close(mse[-1], plain)


def test_the_teachers_prefix_is_renormalised(rows):
    """A teacher of the same directions in its first dimensions and more behind is met exactly at the first widths."""
    student, teacher = rows[0], rows[1].clone()
    teacher[:, :5] = student[:, :5]
    for kind in KINDS:
        _, values = nested_distill(student, teacher, nesting=NESTING, kind=kind, per_width=True)
        assert bool((values[:2].abs() <= 1e-12).all())
        assert values[2] > 0.01


@pytest.mark.parametrize("wide", [7, 30])
def test_a_teacher_of_other_dimensions(wide, rows):
    student = rows[0].clone().requires_grad_()
    teacher = torch.randn(9, wide, dtype=torch.float64)
    _, values = nested_distill(student, teacher, nesting=NESTING, kind="similarity", per_width=True)
    for value, width in zip(values, NESTING.widths, strict=True):
        s, t = normalize(student.detach()[:, :width]), normalize(teacher)
        torch.testing.assert_close(value, (s @ s.T - t @ t.T).square().mean())
    taught = mt.Nesting([1, 4, 7])
    options = {"kind": "similarity", "teacher_nesting": taught}
    _, values = nested_distill(student, teacher, nesting=NESTING, per_width=True, **options)
    for value, width, other in zip(values, NESTING.widths, taught.widths, strict=True):
        s, t = normalize(student.detach()[:, :width]), normalize(teacher[:, :other])
        torch.testing.assert_close(value, (s @ s.T - t @ t.T).square().mean())


def test_similarity_is_learned_by_rotating_the_teacher(rows):
    """The in-batch cosines do not change under a rotation, so a rotated teacher is met at full width."""
    turn, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    value = nested_distill(rows[0], rows[0] @ turn, nesting=mt.Nesting([12]), kind="similarity")
    assert float(value) <= 1e-24


def neighbours(student, teacher, widths, temperature):
    """By the definition, row by row."""
    values = []
    for width in widths:
        s, t = normalize(student[:, :width]), normalize(teacher)
        different = ~torch.eye(len(s), dtype=torch.bool)
        spread, aim = ((x @ x.T)[different].detach().std(correction=0) for x in (s, t))
        terms = []
        for row in range(len(s)):
            others = [n for n in range(len(s)) if n != row]
            p = (t[others] @ t[row] / temperature).softmax(0)
            q = (s[others] @ s[row] / (temperature * spread / aim)).softmax(0)
            terms.append((p * (p.log() - q.log())).sum())
        values.append(torch.stack(terms).mean())
    return torch.stack(values)


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("wide", [12, 30])
def test_neighbours_are_those_of_the_whole_teacher_at_every_width(chunk, wide, rows):
    student, again = rows[0].clone().requires_grad_(), rows[0].clone().requires_grad_()
    teacher = torch.randn(9, wide, dtype=torch.float64)
    total, values = nested_distill(
        student, teacher, nesting=NESTING, kind="neighbours", temperature=0.2, chunk=chunk, per_width=True
    )
    total.backward()
    expected = neighbours(again, teacher, NESTING.widths, 0.2)
    (expected * torch.tensor(NESTING.weights)).sum().backward()
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(student.grad, again.grad)


def test_neighbours_of_a_turned_teacher_are_met_at_full_width_and_its_prefixes_are_not_read(rows):
    turn, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    student = (rows[0] @ turn).requires_grad_()
    total, values = nested_distill(student, rows[0], nesting=NESTING, kind="neighbours", per_width=True)
    assert float(values[-1].abs()) <= 1e-12
    assert bool((values[:2] > 0.01).all())
    total.backward()
    assert student.grad.isfinite().all()
    same = nested_distill(student, rows[0] @ turn, nesting=NESTING, kind="neighbours")
    torch.testing.assert_close(same, total)
    longer = nested_distill(student, rows[0], nesting=NESTING, kind="neighbours", teacher_nesting=NESTING)
    assert float((longer - total).detach().abs()) > 0.01


def test_two_rows_have_one_neighbour_each_and_nothing_to_learn(rows):
    student = rows[0][:2].clone().requires_grad_()
    total = nested_distill(student, rows[1][:2], nesting=NESTING, kind="neighbours")
    total.backward()
    assert float(total.detach()) == 0
    assert not student.grad.any()


def test_the_teacher_gets_no_gradient(rows):
    student, teacher = rows[0].clone().requires_grad_(), rows[1].clone().requires_grad_()
    for kind in [*KINDS, "neighbours"]:
        nested_distill(student, teacher, nesting=NESTING, kind=kind).backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all()


def test_score_losses_are_zero_on_the_students_own_scores(rows):
    q, p, n = rows[:3]
    margins = 20 * (cosines(q, p, NESTING.widths) - cosines(q, n, NESTING.widths))
    _, values = nested_margin_mse(q, p, n, margins, nesting=NESTING, per_width=True)
    assert bool((values <= 1e-12).all())
    candidates = rows[1:].transpose(0, 1)
    scores = cosines(q[:, None], candidates, NESTING.widths) / 0.05
    _, values = nested_kl(q, candidates, scores, nesting=NESTING, per_width=True)
    assert bool((values.abs() <= 1e-12).all())


def test_full_width_is_sentence_transformers_on_unit_vectors(rows):
    q, p, n = (normalize(x) for x in rows[:3])
    margins = torch.linspace(-1, 1, 9, dtype=torch.float64)
    full = mt.Nesting([12])
    want = MarginMSELoss(None).compute_loss_from_embeddings([q, p, n], margins)
    torch.testing.assert_close(nested_margin_mse(q, p, n, margins, nesting=full, scale=1.0), want)
    scores = torch.rand(9, 2, dtype=torch.float64)
    want = DistillKLDivLoss(None).compute_loss_from_embeddings([q, p, n], scores)
    got = nested_kl(q, torch.stack([p, n], 1), scores, nesting=full, temperature=1.0)
    torch.testing.assert_close(got, want)


def test_teacher_scores_are_read_as_they_are(rows):
    """Doubled dot products are another teacher; a constant per query is not, for KL."""
    q, candidates = rows[0], rows[1:].transpose(0, 1)
    scores = torch.randn(9, 4).double() * 8
    value = nested_kl(q, candidates, scores, nesting=NESTING)
    torch.testing.assert_close(nested_kl(q, candidates, scores + 100, nesting=NESTING), value)
    assert abs(float(nested_kl(q, candidates, scores * 2, nesting=NESTING) - value)) > 1e-3


def test_a_learned_scale_may_start_below_the_margins(rows):
    scale = torch.tensor(1.0, requires_grad=True)
    nested_margin_mse(*rows[:3], torch.full((9,), 30.0), nesting=NESTING, scale=scale).backward()
    assert scale.grad.isfinite()


def test_half_precision_and_autocast(rows):
    q, p, n = rows[:3].bfloat16()
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = [nested_distill(q, p, nesting=NESTING, kind=kind) for kind in KINDS]
        values.append(nested_kl(q, torch.stack([p, n], 1), torch.randn(9, 2), nesting=NESTING))
    sum(values).backward()
    assert all(value.dtype == torch.float32 for value in values)
    assert q.grad.dtype == torch.bfloat16
    for value, kind in zip(values, KINDS, strict=False):
        exact = nested_distill(q.double(), p.double(), nesting=NESTING, kind=kind)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


def test_zero_and_identical_rows_have_finite_gradients():
    student = torch.ones(4, 4)
    student[1] = 0
    student.requires_grad_()
    for kind in KINDS:
        nested_distill(student, torch.ones(4, 4), nesting=ONE, kind=kind).backward()
    nested_margin_mse(student, student, student, torch.zeros(4), nesting=ONE).backward()
    nested_kl(student, torch.ones(4, 2, 4), torch.zeros(4, 2), nesting=ONE).backward()
    assert student.grad.isfinite().all()


X = torch.randn(3, 4)
LONG = torch.randn(3, 6)
BAD = X.clone()
BAD[2, 3] = torch.nan
M = torch.tensor([0.5, 1.0, -1.0])
C, S = torch.randn(3, 2, 4), torch.randn(3, 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nested_distill(X, X, nesting=ONE, kind="dot"), "kind must be .* got 'dot'"),
        (lambda: nested_distill(X, X[:2], nesting=ONE), "teacher has 2 rows and student 3"),
        (lambda: nested_distill(X, X[0], nesting=ONE), r"teacher must be a \(B, E\) floating tensor, got \(4,\)"),
        (lambda: nested_distill(X, X.long(), nesting=ONE), "of torch.int64"),
        (lambda: nested_distill(X, BAD, nesting=ONE), "the loss at width 4 is nan: row 2 of teacher holds NaN"),
        (lambda: nested_distill(BAD, X, nesting=ONE, kind="mse"), "width 4 is nan: row 2 of student holds NaN"),
        (lambda: nested_distill(X, BAD, nesting=ONE, kind="similarity"), r"teacher\[2, 3\] is nan"),
        (lambda: nested_distill(BAD, X, nesting=ONE, kind="similarity"), "width 4 is nan: row 2 of student"),
        (lambda: nested_distill(X[:1], X[:1], nesting=ONE, kind="similarity"), "batch of one has no pairs"),
        (
            lambda: nested_distill(X, LONG, nesting=ONE),
            "student has 4 and the teacher 6; use kind='similarity' or 'neighbours', or teacher_nesting=nesting if",
        ),
        (
            lambda: nested_distill(X, X[:, :3], nesting=ONE, kind="mse"),
            "3; use kind='similarity' or 'neighbours'$",
        ),
        (
            lambda: nested_distill(X, LONG, nesting=ONE, teacher_nesting=mt.Nesting([2, 6])),
            r"must have the student's widths \[2, 4\], got \[2, 6\]; use kind='similarity' or 'neighbours'",
        ),
        (
            lambda: nested_distill(X, LONG, nesting=ONE, kind="similarity", teacher_nesting=mt.Nesting([6])),
            r"one width for each of the student's 2, inside 1\.\.6, got \[6\]",
        ),
        (
            lambda: nested_distill(X, LONG, nesting=ONE, kind="similarity", teacher_nesting=mt.Nesting([2, 8])),
            r"inside 1\.\.6, got \[2, 8\]",
        ),
        (
            lambda: nested_margin_mse(X, X, X, M * 100, nesting=ONE),
            r"has 50 in row 0, but at width 2 .* within \+-40; use a scale of at least 25, or learn it",
        ),
        (lambda: nested_margin_mse(X, X, X, M[:2], nesting=ONE), r"must be \(3,\) or \(2, 3\), got \(2,\)"),
        (lambda: nested_margin_mse(X, X, X, M * torch.nan, nesting=ONE), r"teacher_margins\[0\] is nan"),
        (lambda: nested_margin_mse(X, X, X[:2], M, nesting=ONE), "negatives has 2 rows and queries 3"),
        (lambda: nested_margin_mse(X, BAD, X, M, nesting=ONE), "width 4 is nan: row 2 of positives"),
        (lambda: nested_kl(X, C[:, :1], S[:, :1], nesting=ONE), "give at least 2 candidates"),
        (lambda: nested_kl(X, X, S, nesting=ONE), r"candidates must be a \(B, K, 4\) floating tensor, got \(3, 4\)"),
        (lambda: nested_kl(X, C[:2], S, nesting=ONE), "candidates has 2 rows and queries 3"),
        (lambda: nested_kl(X, C, S.T, nesting=ONE), r"teacher_scores must be \(3, 2\) or \(2, 3, 2\), got \(2, 3\)"),
        (lambda: nested_kl(X, C, S / 0, nesting=ONE), r"teacher_scores\[0, 0\] is -?inf"),
        (lambda: nested_kl(X, C, S, nesting=ONE, temperature=0.0), "temperature must be finite and above 0"),
        (lambda: nested_kl(X, C, S, nesting=ONE, teacher_temperature=-1.0), "teacher_temperature must be finite and"),
        (lambda: nested_kl(X, C * torch.nan, S, nesting=ONE), "width 2 is nan: row 0 of candidates"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
