"""Milvus Lite by the contract of every index. `test_milvus_server.py` asks a real server the same."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from index_contract import WIDTH, IndexContract

from matryo import Index

pytest.importorskip("milvus_lite", reason="pip install 'matryo[milvus]'")
from matryo.engines.milvus import MilvusLiteIndex

COUNT = itertools.count()


class MilvusContract(IndexContract):
    codes = ("float32",)
    coarse = "float32"
    kept = np.float32
    first_stages = ("32:float32",)
    """What the suite's plans scan first, beside full vectors."""

    def url(self, where: Path) -> str:
        raise NotImplementedError

    def create(self, where: Path, width: int, plan: str | None) -> Index:
        index = Index.create(self.url(where), width=width, plan=plan)
        for stage in self.first_stages if width == WIDTH else ():
            index.prepare(stage)
        return index

    def reopen(self, index: Index, where: Path) -> Index:
        index.close()
        return Index.open(str(index.address))


class TestMilvusLite(MilvusContract):
    bits = "float32"
    refused = (
        ("32:binary keep 9 > 64:float32", "flat of Milvus Lite runs over float32"),
        ("32:float32 keep 9 > 64:int8", "score by float32"),
        ("32:float32 ivf(cells=4,probe=2,at=16) keep 9 > 64:float32", "leave `at` out"),
        ("32:float32 keep 9 within 0.1 > 64:float32", "leave `within` out"),
        ("32:float32 keep 20000 > 64:float32", "hands on at most 16,384"),
        ("16:float32 keep 9 > 64:float32", "nothing prepared for 16:float32; call prepare"),
    )

    def url(self, where: Path) -> str:
        return f"milvus+lite://{where}/lite.db/docs"


class TestMilvusLiteInOneCollection(TestMilvusLite):
    """The prefix beside the full vectors in one collection, as servers from 2.4 on hold it."""

    first_stages = ()

    def create(self, where: Path, width: int, plan: str | None) -> Index:
        return super().create(where, width, plan or "32:float32 keep 200 > 64:float32")


def test_what_milvus_lite_can_is_data():
    assert MilvusLiteIndex.can.scans["flat"] == ("float32",)
