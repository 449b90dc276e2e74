"""The contract, on Qdrant embedded and, over a wire, on the engine of the same requests that its client brings."""

from pathlib import Path

import numpy as np
import pytest
from index_contract import IndexContract, rows
from qdrant_wire import QdrantWire

from matryo import Index
from matryo.engines.qdrant import QdrantIndex


class QdrantContract(IndexContract):
    codes = QdrantIndex.can.rescores
    ties = QdrantIndex.can.ties
    refused = (
        ("32:int4 keep 9 > 64:float32", "runs over float32, float16, int8, binary"),
        ("32:float32 keep 9 > 64:pq8", "score by float32, float16, int8, binary"),
        ("32:float32 ivf(cells=4,probe=2) keep 9 > 64:float32", "scans by flat, hnsw"),
        ("32:binary keep 9 within 0.1 > 64:float32", "leave `within` out"),
    )

    @pytest.fixture(autouse=True)
    def _prepare(self, monkeypatch):
        """A search may go by what is prepared, as `Can.any_plan` says: so are the contract's plans, when asked for."""
        search = QdrantIndex.search

        def prepared(index, *args, plan=None, **more):
            if plan is not None:
                index.prepare(plan)
            return search(index, *args, plan=plan, **more)

        assert not QdrantIndex.can.any_plan
        monkeypatch.setattr(QdrantIndex, "search", prepared)

    def create(self, where: Path, width: int, plan: str | None) -> Index:
        return Index.create(self.url, width=width, plan=plan)

    def reopen(self, index: Index, where: Path) -> Index:
        index.close()
        return Index.open(self.url)


class TestQdrantEdge(QdrantContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.url = f"qdrant+edge://{tmp_path}/docs"


@pytest.mark.filterwarnings("ignore:Local mode performs exact")
class TestQdrantServer(QdrantContract):
    """The requests of a server, over a wire; behind it the engine of plain Python that the client brings."""

    @pytest.fixture(autouse=True)
    def _wire(self):
        wire = QdrantWire()
        self.url = wire.url("docs")
        yield
        wire.stop()

    def test_lengths_far_from_one_are_fine(self, index):
        # As in the contract, but for the order of two whose scores differ in the last digit of a float32.
        tiny, huge = rows(3) * np.float32(1e-36), rows(3).astype(np.float64) * 1e37
        index.upsert(["a", "b", "c"], tiny)
        index.upsert(["x", "y", "z"], huge)
        hits = index.search(tiny, k=2)
        assert [set(found) for found in hits.ids] == [{"a", "x"}, {"b", "y"}, {"c", "z"}]
        np.testing.assert_allclose(hits.scores, 1, atol=5e-4)
