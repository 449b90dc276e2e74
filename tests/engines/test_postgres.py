import itertools
from pathlib import Path

import numpy as np
import pytest
from index_contract import IndexContract

from matryo import Index
from matryo.engines.postgres import PostgresIndex

COUNT = itertools.count()


class TestPostgres(IndexContract):
    codes = PostgresIndex.can.rescores
    coarse = "float16"
    refused = (
        ("32:int8 keep 9 > 64:float32", "runs over float32, float16, binary"),
        ("32:float32 keep 9 > 64:pq8", "score by float32, float16, binary"),
        ("32:float32 ivf(cells=4,probe=2,at=16) keep 9 > 64:float32", "leave `at` out"),
        ("32:binary keep 9 within 0.1 > 64:float32", "leave `within` out"),
    )
    kept = np.float16
    store = "float16"

    @pytest.fixture(autouse=True)
    def _server(self, postgres):
        self.url = postgres.url(f"t{next(COUNT)}")

    def create(self, where: Path, width: int, plan: str | None) -> Index:
        return Index.create(self.url, width=width, plan=plan, store=self.store)

    def reopen(self, index: Index, where: Path) -> Index:
        index.close()
        return Index.open(self.url)


class TestPostgresFloat32(TestPostgres):
    kept = np.float32
    store = "float32"
