from pathlib import Path

from index_contract import IndexContract

from matryo.index import Index
from matryo.index.funnel import CODES


class TestEmbedded(IndexContract):
    codes = CODES

    def create(self, where: Path, width: int, plan: str | None) -> Index:
        return Index.create(where / "index.matryo", width=width, plan=plan)

    def reopen(self, index: Index, where: Path) -> Index:
        index.close()
        return Index.open(where / "index.matryo")
