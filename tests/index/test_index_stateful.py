"""Random histories against a dict and brute force."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from index_contract import unit
from test_index_funnel import plans

from matryo.index import Index

WIDTH = 16
QUICK = (Phase.explicit, Phase.generate)  # shrinking would take minutes; the slow run shrinks
KEYS = st.sampled_from([f"k{n}" for n in range(12)])
SEEDS = st.integers(0, 7)  # few vectors, so that ties come often


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)


class Histories(RuleBasedStateMachine):
    """The model: key -> (vector's seed, document, metadata), in insertion order, which is the order among equals."""

    @initialize(plan=plans(WIDTH), store=st.sampled_from(["float16", "float32"]))
    def create(self, plan, store):
        self.store = store
        self.folder = Path(tempfile.mkdtemp())
        self.index = Index.create(self.folder / "i", width=WIDTH, plan=plan, store=store)
        self.reader = Index.open(self.folder / "i", read_only=True)
        self.model: dict[str, tuple[int, str | None, dict | None]] = {}

    @rule(keys=st.lists(KEYS, unique=True, max_size=6), seed=SEEDS, shelf=st.none() | st.integers(0, 2))
    def upsert(self, keys, seed, shelf):
        seeds = [(seed + n) % 8 for n in range(len(keys))]
        vectors = np.array([vector(s) for s in seeds]).reshape(-1, WIDTH)
        texts = [None if s % 3 == 0 else f"{key} {s}" for key, s in zip(keys, seeds, strict=True)]
        fields = [None if shelf is None else {"shelf": shelf}] * len(keys)
        assert self.index.upsert(keys, vectors, texts, fields) == len(keys)
        for item in zip(keys, seeds, texts, fields, strict=True):
            self.model.pop(item[0], None)
            self.model[item[0]] = item[1:]

    @rule(keys=st.lists(KEYS, max_size=4))
    def delete(self, keys):
        assert self.index.delete(keys) == len(set(keys) & set(self.model))
        for key in keys:
            self.model.pop(key, None)

    @rule()
    def compact(self):
        self.index.compact()
        assert self.index.stats()["dead_rows"] == 0

    @rule(writer=st.booleans())
    def reopen(self, writer):
        if writer:
            self.index.close()
            self.index = Index.open(self.folder / "i")
        else:
            self.reader.close()
            self.reader = Index.open(self.folder / "i", read_only=True)

    @rule(
        seed=SEEDS,
        k=st.integers(1, 14),
        plan=st.none() | plans(WIDTH, keep_all=100),
        shelf=st.none() | st.integers(0, 2),
        reading=st.booleans(),
    )
    def search(self, seed, k, plan, shelf, reading):
        index = self.reader if reading else self.index
        exhaustive = plan is not None or shelf is not None  # a plan that keeps all, or few matches: exact
        hits = index.search(vector(seed), k=k, plan=plan, where=None if shelf is None else {"shelf": shelf})
        live = [(k, *v) for k, v in self.model.items() if shelf is None or (v[2] or {}).get("shelf") == shelf]
        query = unit(vector(seed)[None])[0]
        held = {s: unit(vector(s)[None])[0].astype(self.store).astype(np.float64) for _, s, _, _ in live}
        truth = {key: float(held[s] @ query) for key, s, _, _ in live}
        assert len(hits.ids[0]) == min(k, len(live))
        for key, score, text, fields in zip(
            hits.ids[0], hits.scores[0], hits.documents[0], hits.metadata[0], strict=True
        ):
            assert abs(score - truth[key]) < 1e-6
            assert self.model[key][1:] == (text, fields)
        if exhaustive:
            order = sorted(truth, key=lambda key: -round(truth[key], 6))  # stable: insertion order among equals
            assert hits.ids[0] == order[:k]

    @invariant()
    def both_agree_with_the_model(self):
        if hasattr(self, "model"):
            assert len(self.index) == len(self.reader) == len(self.model)

    def teardown(self):
        if hasattr(self, "model"):
            assert self.index.check().problems == ()
            assert self.reader.check().problems == ()
            self.reader.close()
            self.index.close()
            shutil.rmtree(self.folder)


def test_random_histories_agree_with_a_dict_and_brute_force():
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=15, stateful_step_count=25, deadline=None, phases=QUICK)
    )


@pytest.mark.slow
def test_1000_random_histories_of_50_steps():
    run_state_machine_as_test(Histories, settings=settings(max_examples=1000, stateful_step_count=50, deadline=None))
