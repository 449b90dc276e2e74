"""The funnel and its parts against slow twins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_contract import Stored, rows, unit

from matryo.core.codecs import Float16
from matryo.core.errors import InputError
from matryo.core.plan import Plan, Stage
from matryo.core.prefix import truncate
from matryo.index.column import Column, hamming
from matryo.index.funnel import CODES, SCANS, best, check_plan, default_plan, run
from matryo.index.snapshot import row_products
from matryo.index.trained import index_codec
from matryo.index.vectors import halves

NAMES = (*(code for code in CODES if code != "pq<bytes>"), "pq4")  # pq4 fits every width that 8 divides


class Arrays:
    """The plainest possible source: decode everything, score everything."""

    def __init__(self, base: np.ndarray) -> None:
        self.base = unit(base).astype(np.float32)

    width = property(lambda self: self.base.shape[1])
    count = property(lambda self: len(self.base))

    def scan(self, stage, queries_QD, n):
        everything = np.arange(len(self.base))
        scored = [self.rescore(stage, query, everything) for query in queries_QD]
        return [(scores[rows], rows) for scores in scored for rows in [best(-scores, n)]]

    def rescore(self, stage, query_D, rows_R):
        made = index_codec(stage.code, stage.width)
        prefixes = truncate(self.base[:, : stage.width], stage.width)
        decoded = made.decode(made.fit(prefixes).encode(prefixes))[rows_R]
        return row_products(decoded, query_D[: stage.width])

    def exact(self, query_D, rows_R):
        return row_products(self.base[rows_R], query_D)


@st.composite
def plans(draw, full: int, keep_all: int | None = None):
    """Any plan this index runs over vectors of `full` dimensions."""
    stages: list[Stage] = []
    width, keep = 8, 60
    count = draw(st.integers(1, 3))
    for n in range(count):
        width = draw(st.integers(width // 8, full // 8)) * 8
        keep = keep_all or draw(st.integers(1, keep))
        kept, code = None if n == count - 1 and not keep_all else keep, draw(st.sampled_from(NAMES))
        takes = n == 0 and kept is not None and not keep_all and (width, code) != (full, "float32")
        within = draw(st.none() | st.sampled_from([1e-4, 0.05, 0.4, 2.0])) if takes else None
        stages.append(Stage(width, code, keep=kept, within=within))
    return Plan(tuple(stages))


@given(plan=plans(64, keep_all=1000), seed=st.integers(0, 99), n=st.integers(1, 200), k=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_a_funnel_that_keeps_everything_is_exact_search(plan, seed, n, k):
    base, queries = rows(n, seed), unit(rows(2, seed + 1)).astype(np.float32)
    source = Arrays(base)
    truth = run(Plan.parse("64:float32"), queries, k, source)
    for (found, scores), (expected, exact) in zip(run(plan, queries, k, source), truth, strict=True):
        assert found.tolist() == expected.tolist()
        assert scores.tolist() == exact.tolist()


@given(plan=plans(64), seed=st.integers(0, 99), k=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_whatever_the_plan_the_answer_is_k_distinct_rows_in_order_of_exact_scores(plan, seed, k):
    base, queries = rows(100, seed), unit(rows(2, seed + 1)).astype(np.float32)
    source = Arrays(base)
    for query, (found, scores) in zip(queries, run(plan, queries, k, source), strict=True):
        assert len(set(found.tolist())) == k
        np.testing.assert_array_equal(scores, source.exact(query, found))
        assert (np.diff(scores) <= 0).all()


@given(
    values=st.lists(st.integers(-5, 5), min_size=1, max_size=60),
    barred=st.sets(st.integers(0, 59)),
    n=st.integers(1, 70),
    kind=st.sampled_from([np.int32, np.float32]),
)
def test_best_is_the_stable_sort(values, barred, n, kind):
    costs = np.array(values, kind)
    never = np.inf if kind is np.float32 else np.iinfo(np.int32).max
    costs[[b for b in barred if b < len(costs)]] = never
    allowed = [i for i in np.argsort(costs, kind="stable") if costs[i] < never]
    assert best(costs, n).tolist() == sorted(allowed[:n])
    wide = best(costs, n, slack=0.5)
    assert set(wide.tolist()) >= set(allowed[:n])


def test_halves_are_the_cast_of_every_finite_float16():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    np.testing.assert_array_equal(halves(finite), finite.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(halves(finite)), np.signbit(finite))
    assert Float16.name in CODES


@pytest.mark.parametrize("width", [8, 40, 64, 72, 128, 192, 320, 512, 768, 1000, 1024])
def test_hamming_in_pieces_is_hamming(width):
    base, queries = rows(50, width=width), rows(3, seed=1, width=width)
    column = Column("binary", width)
    column.extend(Stored(base), 30)
    column.extend(Stored(base), 50)
    slow = ((queries[:, None] > 0) != (base[None] > 0)).sum(-1)
    np.testing.assert_array_equal(column.costs(queries)(0, 50), slow)
    np.testing.assert_array_equal(column.costs(queries)(10, 30), slow[:, 10:30])
    signs = np.where(base > 0, 1, -1) / np.sqrt(width)
    np.testing.assert_allclose(column.scores(queries[0], np.array([3, 47])), signs[[3, 47]] @ queries[0], rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "binary"])
def test_costs_are_minus_the_scores_of_decoded_codes(name):
    base, queries = unit(rows(300)).astype(np.float32), unit(rows(2, seed=1)).astype(np.float32)
    column = Column(name, 48)
    column.extend(Stored(base), 300)
    for q in range(2):
        scores = column.scores(queries[q], np.arange(300))
        np.testing.assert_allclose(-column.costs(queries)(0, 300)[q], scores, atol=1e-5)
        np.testing.assert_allclose(-column.costs(queries[q : q + 1])(0, 300)[0], scores, atol=1e-5)


def test_a_rows_score_does_not_depend_on_its_company():
    base = rows(400, width=97)
    query = rows(1, seed=1, width=97)[0]
    alone = np.concatenate([row_products(base[n : n + 1], query) for n in range(400)])
    np.testing.assert_array_equal(row_products(base, query), alone)
    np.testing.assert_array_equal(row_products(base[::-1].copy(), query)[::-1], alone)
    np.testing.assert_array_equal(row_products(base[7:90], query), alone[7:90])


def test_hamming_of_nothing():
    assert hamming(np.zeros((0, 8), np.uint8), np.zeros((4, 8), np.uint8), 4).shape == (0, 4)
    assert hamming(np.zeros((2, 8), np.uint8), np.zeros((4, 8), np.uint8), 0).shape == (2, 0)


@pytest.mark.parametrize("width", [1, 8, 63, 64, 100, 384, 768, 1024, 4096])
def test_the_default_plan_fits_every_width(width):
    plan = check_plan(default_plan(width), width)
    assert Plan.parse(str(plan)) == plan
    assert plan.width == width


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "32:binary hnsw keep 5 > 64:float32",
            r"hnsw runs over float32, float16, bfloat16, int8, int4; for example '64:",
        ),
        ("32:rabitq hnsw keep 5 > 64:float32", "hnsw runs over"),
        ("32:pq8 hnsw keep 5 > 64:float32", "hnsw runs over"),
        ("40:pq16 keep 5 > 64:float32", "pq16 cuts a prefix into 32 equal parts, .* 40 .* use pq4, pq5, pq10, pq20"),
        ("7:pq1 keep 5 > 64:float32", "pq1 cuts .* use an even width"),
        ("32:int8 keep 5 > 48:pq7", r"stage 2 \(48:pq7\): pq7 cuts"),
        ("64:rabitq ivf(cells=4,at=32) keep 5 > 64:float32", "leave `at` out"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(text, said):
    with pytest.raises(InputError, match=said):
        check_plan(Plan.parse(text), 64)


def test_every_scan_and_code_of_the_table_is_accepted():
    for scan, names in SCANS.items():
        for name in names:
            check_plan(Plan.parse(f"64:{name.replace('<bytes>', '16')} {scan} keep 9 > 64:float32"), 64)
