from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("a.parquet", {"text": [...]}, group=100)`: a Parquet file under `corpus/`."""

    def make(name: str, columns: Any, group: int = 100) -> Path:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
        return path

    return make


@pytest.fixture
def corpus(write: Write, debian_rows: list[dict[str, Any]]) -> Path:
    """A folder of two files: 300 texts in row groups of 40, then 100 in groups of 30; every 7th is blank."""
    texts = [row["positive"] for row in debian_rows]
    blank = [None, "", " \n"]
    second = [blank[n % 3] if n % 7 == 0 else texts[n] for n in range(100)]
    write("one.parquet", {"_id": [f"d{n}" for n in range(300)], "text": texts[:300]}, group=40)
    return write("two.parquet", {"_id": [f"e{n}" for n in range(100)], "text": second}, group=30).parent


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    return contents
