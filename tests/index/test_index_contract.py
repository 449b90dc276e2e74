from pathlib import Path

import numpy as np
from index_contract import IndexContract

from matryo.index import Index
from matryo.index.funnel import CODES


class TestEmbedded(IndexContract):
    codes = tuple(code.replace("<bytes>", "8") for code in CODES)
    kept = np.float16
    store = "float16"

    def create(self, where: Path, width: int, plan: str | None) -> Index:
        return Index.create(where / "index.matryo", width=width, plan=plan, store=self.store)

    def reopen(self, index: Index, where: Path) -> Index:
        index.close()
        return Index.open(where / "index.matryo")


class TestEmbeddedFloat32(TestEmbedded):
    kept = np.float32
    store = "float32"
