"""What every search engine of ours must do. An engine's tests subclass this and say how to make one.

What an engine cannot do is data on the class (`codes`), never an exception that a test swallows.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest

from matryo.core.errors import InputError
from matryo.index import Index

WIDTH = 64


def rows(n: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """(n, width) float32 of any length, early dimensions larger, as nested embeddings are."""
    scale = (np.arange(1, width + 1) ** -0.35).astype(np.float32)
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32) * scale * 3


class Stored:
    """Rows as a column or a scanner reads them."""

    def __init__(self, base):
        self.base = base

    def take(self, wanted):
        return self.base[wanted]

    def chunk(self, start, stop):
        return self.base[start:stop]


def rows_of(scanned):
    """The rows of each query's answer, without the scores."""
    return [found for _, found in scanned]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)


def names(n: int) -> list[str]:
    return [f"d{i}" for i in range(n)]


class IndexContract(ABC):
    codes: tuple[str, ...] = ()
    """Codes the engine can scan and rescore."""
    bits = "binary"
    """The shortest code that a first stage scans."""
    coarse = "int8"
    """A code to put between bits and full vectors."""
    refused: tuple[tuple[str, str], ...] = (
        ("32:binary hnsw(M=8,ef=9) keep 9 > 64:float32", "hnsw runs over"),
        ("32:pq7 keep 9 > 64:float32", "pq7 cuts"),
        ("32:float32 keep 9 > 64:pq5", "pq5 cuts"),
    )
    """Plans beyond the engine, and what is said of them."""
    ties = True
    """Whether a shortlist cut between equal scores holds those written first."""
    kept = np.float32
    """What it keeps full vectors as, and therefore scores."""
    ordered = True
    """Whether equal scores come in the order they were written; otherwise they come by id."""
    shards = 1
    """Nodes that each keep what a stage says it keeps."""

    def held(self, x: np.ndarray) -> np.ndarray:
        """Unit rows as the engine keeps them."""
        return unit(x).astype(self.kept).astype(np.float64)

    @abstractmethod
    def create(self, where: Path, width: int, plan: str | None) -> Index:
        """A new, empty index under a fresh folder."""

    @abstractmethod
    def reopen(self, index: Index, where: Path) -> Index:
        """Close it and open it again."""

    @pytest.fixture
    def index(self, tmp_path):
        with self.create(tmp_path, WIDTH, None) as index:
            yield index

    @pytest.fixture
    def filled(self, index):
        fields = [{"shelf": i % 5, "name": f"n{i}", "odd": bool(i % 2), "price": i / 4} for i in range(500)]
        index.upsert(names(500), rows(500), [f"text {i}" for i in range(500)], fields)
        return index

    def test_an_empty_index_answers_with_nothing(self, index):
        assert len(index) == 0
        hits = index.search(rows(2), k=3)
        assert (hits.ids, hits.scores, hits.documents, hits.metadata) == ([[], []],) * 4
        assert index.search(rows(1), where={"a": 1}).ids == [[]]

    def test_scores_are_full_width_cosines_and_the_rest_comes_along(self, filled):
        query = rows(3, seed=9)
        hits = filled.search(query, k=7, plan=f"{WIDTH}:float32")
        truth = unit(query) @ self.held(rows(500)).T
        for q in range(3):
            order = np.argsort(-truth[q], kind="stable")[:7]
            assert hits.ids[q] == [f"d{i}" for i in order]
            np.testing.assert_allclose(hits.scores[q], truth[q][order], atol=1e-6)
            assert hits.documents[q] == [f"text {i}" for i in order]
            assert [m["name"] for m in hits.metadata[q]] == [f"n{i}" for i in order]

    def test_every_code_gives_exact_scores_of_what_it_finds(self, filled):
        query = rows(2, seed=5)
        truth = unit(query) @ self.held(rows(500)).T
        for code in self.codes:
            for plan in (
                f"32:{code} keep 100 > {WIDTH}:float32",
                f"{WIDTH}:{code}",
                f"32:{code} keep 50 > 48:{code} keep 20",
            ):
                hits = filled.search(query, k=5, plan=plan)
                for q in range(2):
                    assert len(hits.ids[q]) == 5
                    assert hits.scores[q] == sorted(hits.scores[q], reverse=True)
                    found = [int(key[1:]) for key in hits.ids[q]]
                    np.testing.assert_allclose(hits.scores[q], truth[q][found], atol=1e-6)

    def test_one_query_may_be_a_plain_row(self, filled):
        query = rows(1, seed=3)
        assert filled.search(query[0], k=4).ids == filled.search(query, k=4).ids
        assert filled.search(query[0].tolist(), k=4).ids == filled.search(query, k=4).ids

    def test_k_beyond_the_items_gives_all_and_keep_is_never_below_k(self, filled):
        assert len(filled.search(rows(1), k=10_000).ids[0]) == 500
        assert len(filled.search(rows(1), k=30, plan=f"32:{self.bits} keep 2 > {WIDTH}:float32").ids[0]) == 30

    def test_upsert_replaces_the_whole_item(self, filled):
        assert filled.upsert(["d3"], rows(1, seed=77)) == 1
        assert len(filled) == 500
        hits = filled.search(rows(1, seed=77), k=1)
        assert (hits.ids, hits.documents, hits.metadata) == ([["d3"]], [[None]], [[None]])
        assert hits.scores[0][0] == pytest.approx(1, abs=5e-4)

    def test_delete_counts_what_was_there_and_it_stays_away(self, filled, tmp_path):
        assert filled.delete(["d0", "d0", "nobody"]) == 1
        assert filled.delete(["d0"]) == 0
        assert filled.delete([]) == 0
        index = self.reopen(filled, tmp_path)
        with index:
            assert len(index) == 499
            index.compact()
            for plan in (None, f"{WIDTH}:float32"):
                assert "d0" not in index.search(rows(1), k=500, plan=plan).ids[0]
            assert index.upsert(["d0"], rows(1)) == 1
            assert index.search(rows(1), k=1).ids == [["d0"]]

    def test_deletions_do_not_eat_the_shortlist(self, filled):
        query = rows(1, seed=8)
        order = filled.search(query, k=500, plan=f"{WIDTH}:float32").ids[0]
        filled.delete(order[:450])
        assert (
            filled.search(query, k=10, plan=f"{WIDTH}:{self.bits} keep 50 > {WIDTH}:float32").ids[0] == order[450:460]
        )

    def test_equal_vectors_come_in_the_order_they_were_written(self, index):
        same = np.repeat(rows(1), 40, axis=0)
        index.upsert(names(40), same)
        index.upsert(["d0"], same[:1])  # now the youngest
        order = [*(f"d{i}" for i in range(1, 40)), "d0"] if self.ordered else sorted(names(40))
        for plan in (f"{WIDTH}:float32", f"{WIDTH}:{self.bits} keep 40 > {WIDTH}:float32"):
            assert index.search(rows(1, seed=4), k=6, plan=plan).ids == [order[:6]]
        found = index.search(rows(1, seed=4), k=6, plan=f"32:{self.coarse} keep 10 > 64:float32").ids[0]
        assert len(found) == 6
        assert found == (order[:6] if self.ties else sorted(found, key=order.index))

    @pytest.mark.parametrize(
        ("where", "keeps"),
        [
            ({"shelf": 3}, lambda i: i % 5 == 3),
            ({"shelf": 3, "odd": True}, lambda i: i % 5 == 3 and i % 2 == 1),
            ({"shelf": {">=": 1, "<": 3}}, lambda i: 1 <= i % 5 < 3),
            ({"shelf": {"!=": 0}}, lambda i: i % 5 != 0),
            ({"name": {"in": ["n4", "n400", "none"]}}, lambda i: i in (4, 400)),
            ({"shelf": {"not_in": [0, 1]}}, lambda i: i % 5 > 1),
            ({"or": [{"shelf": 0}, {"price": {">": 120.5}}]}, lambda i: i % 5 == 0 or i / 4 > 120.5),
            ({"not": {"or": [{"shelf": {"<=": 3}}]}}, lambda i: i % 5 == 4),
            ({"missing": None}, lambda _: True),
            ({"missing": {"<": 3}}, lambda _: False),
            ({"not": {"missing": {"<": 3}}}, lambda _: True),
            ({"name": {">": 3}}, lambda _: False),
            ({"name": 3}, lambda _: False),
            ({"shelf": "3"}, lambda _: False),
            ({"name": "x' OR 1=1 --"}, lambda _: False),
            ({"x') OR 1=1 --": 1}, lambda _: False),
            ({"price": 0.25}, lambda i: i == 1),
        ],
    )
    def test_where(self, filled, where, keeps):
        wanted = {f"d{i}" for i in range(500) if keeps(i)}
        assert set(filled.search(rows(1), k=500, where=where).ids[0]) == wanted
        filled.delete(["d3", "d4"])
        assert set(filled.search(rows(1), k=500, where=where).ids[0]) == wanted - {"d3", "d4"}

    def test_a_filter_with_many_matches_keeps_its_recall(self, index):
        base = rows(4000)
        index.upsert(names(4000), base, metadata=[{"part": int(i % 3 == 0)} for i in range(4000)])
        query = rows(1, seed=6)
        truth = (unit(query) @ unit(base).T)[0]
        for part in (0, 1):
            mine = [i for i in np.argsort(-truth, kind="stable") if (i % 3 == 0) == part]
            for plan in (f"{WIDTH}:float32", f"{WIDTH}:{self.coarse} keep 200 > {WIDTH}:float32"):
                got = index.search(query, k=10, plan=plan, where={"part": part}).ids[0]
                assert got == [f"d{i}" for i in mine[:10]]

    @pytest.mark.parametrize(
        ("where", "says"),
        [
            ({"a": {"~": 1}}, "unknown operator '~'"),
            ({"a": [1, 2]}, '"in"'),
            ({"a": {"in": 3}}, "takes a list"),
            ({"a": {"in": [None]}}, "None cannot stand"),
            ({"a": {}}, "is empty"),
            ({}, "must be a dict"),
            ("a = 1", "must be a dict"),
            ({"or": []}, "takes a list of dicts"),
            ({"not": 3}, "must be a dict"),
            ({'a"b': 1}, "a quote"),
            ({"a": float("nan")}, "NaN"),
            ({"a": {"<": None}}, "above or below"),
            ({"a": 2**70}, "64 bits"),
            ({"a": object()}, "must be text"),
        ],
    )
    def test_a_wrong_filter_is_refused(self, filled, where, says):
        with pytest.raises(InputError, match=says.replace("(", r"\(")):
            filled.search(rows(1), where=where)

    def test_a_filter_nested_too_deep_is_refused(self, filled):
        where: dict = {"shelf": 1}
        for _ in range(40):
            where = {"not": where}
        with pytest.raises(InputError, match="nested"):
            filled.search(rows(1), where=where)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_vectors_that_are_not_numbers_name_their_row(self, filled, bad):
        wrong = rows(4)
        wrong[2, 5] = bad
        with pytest.raises(InputError, match="vectors: row 2 holds NaN or Inf"):
            filled.upsert(names(4), wrong)
        with pytest.raises(InputError, match="queries: row 2 holds NaN or Inf"):
            filled.search(wrong)
        wrong[2] = 0
        with pytest.raises(InputError, match="vectors: row 2 is all zeros"):
            filled.upsert(names(4), wrong)
        with pytest.raises(InputError, match="queries: row 2 is all zeros"):
            filled.search(wrong)
        assert len(filled) == 500

    def test_other_wrong_input_is_refused_and_changes_nothing(self, filled):
        calls = [
            (lambda: filled.upsert(["a", "b", "a"], rows(3)), r"ids\[2\] 'a' is twice"),
            (lambda: filled.upsert(["a", ""], rows(2)), r"ids\[1\]"),
            (lambda: filled.upsert(["a", 3], rows(2)), r"ids\[1\]"),
            (lambda: filled.upsert("ab", rows(2)), "write \\[id\\]"),
            (lambda: filled.upsert(["\ud800"], rows(1)), "surrogate"),
            (lambda: filled.upsert(["a\0"], rows(1)), "NUL"),
            (lambda: filled.upsert(["a"], rows(2)), "1 ids but 2 vectors"),
            (lambda: filled.upsert(["a"], rows(1, width=32)), r"expected \(N, 64\)"),
            (lambda: filled.upsert(["a"], rows(1)[0]), r"expected \(N, 64\)"),
            (lambda: filled.upsert(["a"], [["x"] * 64]), r"expected \(N, 64\)"),
            (lambda: filled.upsert(["a"], np.full((1, 64), 1e39)), "NaN or Inf"),
            (lambda: filled.upsert(["a", "b"], [[1.0] * 64, [1.0] * 63]), "differ in length"),
            (lambda: filled.upsert(["a"], rows(1), ["x", "y"]), "documents"),
            (lambda: filled.upsert(["a"], rows(1), [3]), r"documents\[0\]"),
            (lambda: filled.upsert(["a"], rows(1), metadata=[{}, {}]), "metadata"),
            (lambda: filled.upsert(["a"], rows(1), metadata=[[1]]), r"metadata\[0\]"),
            (lambda: filled.upsert(["a"], rows(1), metadata=[{"x": [1]}]), r"metadata\[0\]\['x'\]"),
            (lambda: filled.upsert(["a"], rows(1), metadata=[{"x": float("inf")}]), "NaN or Inf"),
            (lambda: filled.upsert(["a"], rows(1), metadata=[{3: 1}]), "field names"),
            (lambda: filled.delete("abc"), "must be a list"),
            (lambda: filled.search(rows(1, width=63)), r"expected \(N, 64\)"),
            (lambda: filled.search(rows(1), k=0), "k must be"),
            (lambda: filled.search(rows(1), k=True), "k must be"),
            (lambda: filled.search(rows(1), plan="65:float32"), "65"),
            (lambda: filled.search(rows(1), plan="nonsense"), "stage 1"),
            *((lambda plan=plan: filled.search(rows(1), plan=plan), says) for plan, says in self.refused),
        ]
        for call, says in calls:
            with pytest.raises(InputError, match=says):
                call()
        assert len(filled) == 500

    def test_nothing_to_write_is_no_error(self, filled):
        assert filled.upsert([], np.empty((0, WIDTH), np.float32)) == 0
        assert filled.upsert([], []) == 0
        assert filled.search(np.empty((0, WIDTH), np.float32)).ids == []

    def test_lengths_far_from_one_are_fine(self, index):
        tiny, huge = rows(3) * np.float32(1e-36), rows(3).astype(np.float64) * 1e37
        index.upsert(["a", "b", "c"], tiny)
        index.upsert(["x", "y", "z"], huge)
        hits = index.search(tiny, k=2)
        assert hits.ids == [["a", "x"], ["b", "y"], ["c", "z"]]
        np.testing.assert_allclose(hits.scores, 1, atol=5e-4)

    def test_what_was_written_is_there_after_reopening(self, filled, tmp_path):
        before = filled.search(rows(5, seed=2), k=20)
        index = self.reopen(filled, tmp_path)
        with index:
            assert index.search(rows(5, seed=2), k=20) == before

    def test_explain_says_what_each_stage_did(self, filled):
        hits = filled.search(
            rows(2), k=3, plan=f"32:{self.bits} keep 40 > 64:{self.coarse} keep 9 > 64:float32", explain=True
        )
        told = [(s.stage, s.considered, s.kept) for s in hits.explanation]
        wide, short = 80 * self.shards, 18 * self.shards
        assert told == [
            (f"32:{self.bits} keep 40", 1000, wide),
            (f"64:{self.coarse} keep 9", wide, short),
            ("64:float32", short, 6),
        ]
        assert filled.search(rows(2)).explanation is None
