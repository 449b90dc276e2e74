"""Milvus Lite by the contract of every index. `test_milvus_server.py` asks a real server the same."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from index_contract import WIDTH, IndexContract, names, rows

from matryo import Index
from matryo.core.errors import InputError, MissingExtraError, NoIndexError
from matryo.index import Batch

pytest.importorskip("milvus_lite", reason="pip install 'matryo[milvus]'")


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


@pytest.fixture
def url(tmp_path):
    return f"milvus+lite://{tmp_path}/lite.db/docs"


def odd_items():
    """Metadata of every kind: lacking fields, None, types that differ, signs and quotes."""
    values = [
        3,
        3.0,
        3.5,
        "3",
        True,
        False,
        0,
        1,
        None,
        "",
        "x",
        -5,
        2**53 + 1,
        1e-7,
        'it\'s "q" \\',
        "l1\nl2\t",
        "é漢",
        "\x01",
    ]
    fields = [{"a": value, "b": n % 4} for n, value in enumerate(values)]
    return [*fields, {}, {"b": 1}, {"a.b": 1, "x') or 1 == 1": "y"}], values


def odd_filters(values):
    for value in values:
        yield {"a": value}
        yield {"a": {"!=": value}}
        if value is not None:
            for operator in ("<", "<=", ">", ">="):
                yield {"a": {operator: value}}
                yield {"not": {"a": {operator: value}}}
            yield {"not": {"or": [{"a": {"in": [value, 1, "x"]}}, {"b": {"not_in": [0, 1]}}]}}
    yield from ({"a": {"in": []}}, {"a": {"not_in": []}}, {"a.b": 1}, {"x') or 1 == 1": "y"}, {"not": {"c": {"<": 3}}})


def filters_agree(index, folder):
    """Every filter gives what it gives in a folder."""
    items, values = odd_items()
    keys, vectors = [f"d{n}" for n in range(len(items))], np.eye(len(items), 32) + 0.1
    for one in (index, folder):
        one.upsert(keys, vectors, metadata=items)
    hits = index.search(vectors[:1], k=100)
    assert dict(zip(hits.ids[0], hits.metadata[0], strict=True)) == dict(zip(keys, items, strict=True))
    for where in odd_filters(values):
        found, wanted = (set(one.search(vectors[:1], k=100, where=where).ids[0]) for one in (index, folder))
        assert found == wanted, where


def test_filters_mean_what_they_mean_in_a_folder(url, tmp_path):
    with Index.create(url, width=32) as index, Index.create(tmp_path / "f", width=32, store="float32") as folder:
        filters_agree(index, folder)


def test_a_file_is_for_one_process_at_a_time_and_several_indexes(url, tmp_path, python):
    program = f"from matryo import Index; print(len(Index.open({url!r})))"
    with Index.create(url, width=8) as index, Index.create(url.replace("docs", "more"), width=8) as more:
        index.upsert(["a"], np.ones((1, 8)))
        with Index.open(url, read_only=True) as again:
            assert (len(again), len(more)) == (1, 0)
        assert len(index) == 1, "the one that closed did not end it for the others"
        assert "LockedError" in python("-c", program).stderr
    done = python("-c", program)
    assert done.stdout == "1\n", done.stderr


def test_what_was_acknowledged_survives_a_killed_process(url, python):
    program = (
        "import os, numpy as np; from matryo import Index; from matryo.index import Batch\n"
        f"index = Index.create({url!r}, width=8)\n"
        "def stream():\n"
        "    for n in range(0, 50, 10):\n"
        "        yield Batch([f'd{i}' for i in range(n, n + 10)], np.ones((10, 8)))\n"
        "        if n == 20: os.kill(os.getpid(), 9)\n"
        "index.extend(stream(), source='file')\n"
    )
    assert python("-c", program).returncode == -9
    with Index.open(url) as index:
        assert (index.read_from("file"), len(index)) == (30, 30)
        index.extend([Batch([f"d{i}" for i in range(30, 50)], np.ones((20, 8)))], source="file")
        assert (index.read_from("file"), len(index)) == (50, 50)


def test_two_writers_in_one_process_lose_and_double_nothing(url):
    Index.create(url, width=WIDTH, plan="32:float32 keep 50 > 64:float32").close()

    def write(seed):
        with Index.open(url) as index:
            for n in range(0, 100, 20):
                index.upsert([f"d{i}" for i in range(n, n + 20)], rows(100, seed)[n : n + 20])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (1, 2)))
    with Index.open(url) as index:
        assert len(index) == 100
        assert sorted(index.search(rows(1), k=200).ids[0]) == sorted(names(100))


def test_wrong_doors_are_named(url, tmp_path):
    with pytest.raises(NoIndexError, match="holds no index"):
        Index.open(url)
    assert not (tmp_path / "lite.db").exists(), "looking makes nothing"
    for wrong in ("milvus+lite://folder/file.db/docs", f"milvus+lite://{tmp_path}/docs"):
        with pytest.raises(InputError, match=r"the whole path of a file that ends in \.db"):
            Index.open(wrong)
    with pytest.raises(InputError, match="unknown option 'tls'; allowed: timeout"):
        Index.open(f"{url}?tls=1")
    with pytest.raises(InputError, match="keeps full vectors as float32, not float16"):
        Index.create(url, width=8, store="float16")
    with Index.create(url, width=8), pytest.raises(InputError, match="a collection of this name already"):
        Index.create(url, width=8)
    with pytest.raises(NoIndexError):
        Index.open(url.replace("docs", "other"))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    for name in [name for name in sys.modules if name.startswith("matryo.engines.milvus")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"pip install 'matryo\[milvus\]'"):
        Index.open("milvus://h/docs")
