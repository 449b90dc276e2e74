"""The contract of every index, on three real servers."""

import itertools

import numpy as np
import pytest
from test_postgres import TestPostgres as OnePostgres

from matryo.engines.postgres_shards import PostgresShards

COUNT = itertools.count()


class TestPostgresShards(OnePostgres):
    ordered = PostgresShards.can.ordered
    shards = 3

    @pytest.fixture(autouse=True)
    def _server(self, three_postgres):
        self.url = three_postgres.url(f"t{next(COUNT)}")


class TestPostgresShardsFloat32(TestPostgresShards):
    kept = np.float32
    store = "float32"
