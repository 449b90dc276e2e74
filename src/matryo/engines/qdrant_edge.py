"""Qdrant embedded in this process (Qdrant Edge), in a folder: `qdrant+edge:///folder/docs`.

The folder holds Edge's own shard and a lock: one process at a time, readers too, as Edge has it. A batch is one
operation of Edge's log, on the disk when a write returns.
"""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from matryo.core.errors import (
    DamagedError,
    FormatError,
    InputError,
    LockedError,
    MissingExtraError,
    NoIndexError,
    StorageError,
)
from matryo.core.files import storage_errors
from matryo.engines import qdrant_requests as words
from matryo.engines.address import Address
from matryo.engines.base import Note, TransientError
from matryo.engines.qdrant import Answer, QdrantIndex
from matryo.engines.qdrant_requests import Json, Vectors
from matryo.index.funnel import Float32s
from matryo.index.index import FROM_ENVIRONMENT
from matryo.index.opening import Lock

try:
    import qdrant_edge as edge
except ImportError as error:
    raise MissingExtraError("qdrant-edge-py", "qdrant-edge", "an embedded index of Qdrant") from error

SCHEME = "qdrant+edge"
SHARD, CONFIG = "shard", "edge_config.json"
FULL_SCAN = 10_000
"""KB of vectors below which a scan of every row takes the place of a graph: Qdrant's own default."""
INDEXED_FROM = 1
"""KB of vectors that get codes and a graph. Edge builds them when told to only, so small ones need not wait."""


class EdgeAddress(Address):
    """A folder."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"


class QdrantEdgeIndex(QdrantIndex):
    """An index in Qdrant Edge."""

    _shard: "edge.EdgeShard | None" = None
    _lock: Lock | None = None

    def __init__(self, address: Address, note: Note, read_only: bool) -> None:
        """Not for callers: use `create` or `open`."""
        super().__init__(address, note, read_only)
        self._calls, self._free = 0, threading.Condition()

    @classmethod
    def _create(cls, path: str | Path, note: Note) -> Self:
        address, noted = _address(path), cls._noted(note)
        folder = Path(address.path)
        if (folder / SHARD).exists():
            raise InputError(f"{address} holds an index already; open it with Index.open, or choose another folder")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{address} is not an empty folder; choose another")
        with storage_errors(f"making {folder}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with _said(address):
                shard = edge.EdgeShard.create(
                    str(made / SHARD), _config(words.read_vectors(noted.extra["prefixes"], note.width))
                )
                shard.update(_upsert([words.note_point(noted.as_text())]))
                shard.flush()
                shard.close()
            with storage_errors(f"making {folder}"):
                os.chmod(made, 0o755)
                os.rename(made, folder)  # onto an empty folder or none
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return cls._open(path, False)

    @classmethod
    def _open(cls, path: str | Path, read_only: bool) -> Self:
        address = _address(path)
        opened = cls(address, Note(1, "1:float32", "float32"), read_only)
        folder = Path(address.path)
        if not folder.is_dir():
            raise NoIndexError(f"{address} holds no index; make one with Index.create(url, width=...)")
        if not (folder / SHARD / CONFIG).is_file():
            raise FormatError(f"{address} is a folder, but not one of an index in Qdrant Edge; choose another")
        try:
            opened._lock = Lock(folder)
        except LockedError as error:
            raise LockedError(
                f"{address} is open elsewhere, and Qdrant Edge lets in one process at a time, readers too; close it"
            ) from error
        try:
            with _said(address, loading=True):
                opened._shard = edge.EdgeShard.load(str(folder / SHARD))
            return opened._opened()
        except BaseException:
            opened.close()
            raise

    def close(self) -> None:
        """Close the shard and give the folder free; harmless twice."""
        super().close()
        shard = self._taken_out()
        if shard is not None:
            with suppress(Exception):
                shard.close()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _open_shard(self) -> Iterator["edge.EdgeShard"]:
        with self._free:
            shard = self._shard
            if shard is None:
                self._refuse_closed()
                raise TransientError("the shard is being opened anew")
            self._calls += 1
        try:
            with _said(self.address):
                yield shard
        finally:
            with self._free:
                self._calls -= 1
                self._free.notify_all()

    def _taken_out(self) -> "edge.EdgeShard | None":
        """The shard, once the calls that are in it have returned; Edge refuses to close it under them."""
        with self._free:
            shard, self._shard = self._shard, None  # calls meanwhile try again
            self._free.wait_for(lambda: self._calls == 0)
        return shard

    def _query(self, requests: list[Json]) -> list[list[Answer]]:
        with self._open_shard() as shard:
            found = shard.query_batch(edge.QueryBatchRequest([_request(request) for request in requests]))
        return [[Answer(str(point.id), point.score, point.payload or {}) for point in points] for points in found]

    def _put(self, points: list[Json], note: Json | None) -> None:
        with self._open_shard() as shard:
            shard.update(_upsert(points if note is None else [*points, note]))
            shard.flush()

    def _get(self, ids: list[str]) -> list[Answer]:
        with self._open_shard() as shard:
            return [_answer(record) for record in shard.retrieve(list(ids), with_payload=True, with_vector=False)]

    def _page(self, where: Json, offset: str | None, limit: int, vectors: list[str]) -> list[Answer]:
        request = edge.ScrollRequest(
            None if offset is None else UUID(offset), limit, _filter(where), with_payload=True, with_vector=vectors
        )
        with self._open_shard() as shard:
            return [_answer(record) for record in shard.scroll(request)[0]]

    def _matching(self, where: Json | None) -> int:
        with self._open_shard() as shard:
            return shard.count(edge.CountRequest(exact=True, filter=None if where is None else _filter(where)))

    def _drop(self, ids: list[str]) -> None:
        with self._open_shard() as shard:
            shard.update(edge.UpdateOperation.delete_points(list(ids)))
            shard.flush()

    def _fill(self, ids: list[str], vectors: dict[str, Float32s]) -> None:
        points = [
            edge.PointVectors(one, {name: rows[n].tolist() for name, rows in vectors.items()})
            for n, one in enumerate(ids)
        ]
        with self._open_shard() as shard:
            shard.update(edge.UpdateOperation.update_vectors(points))
            shard.flush()

    def _add(self, vectors: Vectors, names: list[str]) -> None:
        """Edge adds a vector as an operation, and takes its graph and code from a configuration it is loaded with."""
        there = self._sizes()
        with self._open_shard() as shard:
            for name in names:
                if name not in there:
                    given = vectors[name].as_json(False)
                    datatype = edge.VectorStorageDatatype.Float16 if given["datatype"] == "float16" else None
                    shard.update(
                        edge.UpdateOperation.create_dense_vector(
                            name, given["size"], edge.Distance.Dot, datatype=datatype
                        )
                    )
            shard.flush()
        self._shard = self._loaded_with(vectors)

    def _loaded_with(self, vectors: Vectors) -> "edge.EdgeShard":
        """The shard closed and loaded with another configuration."""
        with _said(self.address):
            shard = self._taken_out()
            if shard is None:
                raise TransientError("the shard is being opened anew")
            shard.close()
            return edge.EdgeShard.load(str(Path(self.address.path) / SHARD), _config(vectors))

    def _index_fields(self, kinds: dict[str, str]) -> None:
        schemas = {"keyword": edge.PayloadSchemaType.Keyword, "float": edge.PayloadSchemaType.Float}
        with self._open_shard() as shard:
            for path, kind in kinds.items():
                shard.update(edge.UpdateOperation.create_field_index(path, schemas[kind]))

    def _indexed_fields(self) -> set[str]:
        with self._open_shard() as shard:
            return set(shard.info().payload_schema)

    def _settle(self) -> None:
        with self._open_shard() as shard:
            shard.optimize()
            shard.flush()

    def _sizes(self) -> dict[str, int]:
        place = Path(self.address.path) / SHARD / CONFIG
        try:
            return {name: int(one["size"]) for name, one in json.loads(place.read_text())["vectors"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{place} cannot be read ({type(error).__name__}: {error})") from error

    def _occupied(self) -> Json:
        files = [file.stat() for file in Path(self.address.path).rglob("*") if file.is_file()]
        with self._open_shard() as shard:
            told = shard.info()
        # Edge's files are sparse: what counts is what the disk gave.
        taken = sum(file.st_blocks * 512 for file in files)
        return {
            "folder_bytes": taken,
            "segments": told.segments_count,
            "indexed_vectors": told.indexed_vectors_count,
        }


@contextmanager
def _said(address: Address, loading: bool = False) -> Iterator[None]:
    """Edge's errors as ours. It has one kind, and panics where a file is not what it should be."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        said = address.clean(error)
        if "WouldBlock" in said:
            raise LockedError(f"{address} is open elsewhere, and Qdrant Edge allows one process at a time") from error
        if "not initialized" in said:
            raise TransientError(said) from error
        if "No space left" in said or "Read-only file system" in said or "Permission denied" in said:
            raise StorageError(f"{address}: the disk refused ({said}); what was acknowledged is there") from error
        if loading:
            raise DamagedError(f"{address} cannot be opened by Qdrant Edge ({said}); {_RECOVER}") from error
        if "vector name" in said or "dimension" in said:
            raise FormatError(f"{address} was changed by hand: {said}") from error
        raise StorageError(f"{address}: Qdrant Edge failed ({said})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DamagedError(f"{address} is damaged: Qdrant Edge gave up ({address.clean(error)}); {_RECOVER}") from error


_RECOVER = "restore the folder from a backup, or build the index again"


def _address(path: str | Path) -> EdgeAddress:
    text = str(path)
    if text.startswith(FROM_ENVIRONMENT):
        text = os.environ.get(text.removeprefix(FROM_ENVIRONMENT), "")
    rest = text.removeprefix(f"{SCHEME}://")
    if rest == text or not rest.startswith("/") or "?" in rest or rest == "/":
        raise InputError(f"{text}: give the whole path of a folder, such as {SCHEME}:///folder/docs, and no options")
    return EdgeAddress(SCHEME, (), rest.rstrip("/"), Path(rest).name)


def _config(vectors: Vectors) -> "edge.EdgeConfig":
    return edge.EdgeConfig(
        vectors={name: _vector(given) for name, given in words.configs(vectors).items()},
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=INDEXED_FROM),
    )


def _vector(given: Json) -> "edge.EdgeVectorParams":
    graph = given["hnsw_config"]
    quantised = given.get("quantization_config", {})
    code: Any = None
    if "scalar" in quantised:
        code = edge.ScalarQuantizationConfig(
            edge.ScalarType.Int8, quantile=quantised["scalar"]["quantile"], memory=edge.Memory.Pinned
        )
    elif "binary" in quantised:
        code = edge.BinaryQuantizationConfig(memory=edge.Memory.Pinned)
    kinds = {"float32": edge.VectorStorageDatatype.Float32, "float16": edge.VectorStorageDatatype.Float16}
    return edge.EdgeVectorParams(
        given["size"],
        edge.Distance.Dot,
        datatype=kinds[given["datatype"]],
        quantization_config=code,
        hnsw_config=edge.HnswIndexConfig(graph["m"], graph.get("ef_construct", 100), FULL_SCAN),
        memory=edge.Memory.Cold if given["on_disk"] else edge.Memory.Cached,
    )


def _upsert(points: list[Json]) -> "edge.UpdateOperation":
    return edge.UpdateOperation.upsert_points(
        [edge.Point(point["id"], point["vector"], point["payload"]) for point in points]
    )


def _request(given: Json) -> "edge.QueryRequest":
    return edge.QueryRequest(
        given["limit"],
        query=edge.Query.Nearest(given["query"], given["using"]),
        prefetches=[_prefetch(one) for one in given.get("prefetch", ())],
        with_payload=given["with_payload"],
        filter=_filter(given["filter"]) if "filter" in given else None,
        params=_params(given["params"]),
    )


def _prefetch(given: Json) -> "edge.Prefetch":
    return edge.Prefetch(
        given["limit"],
        query=edge.Query.Nearest(given["query"], given["using"]),
        prefetches=[_prefetch(one) for one in given.get("prefetch", ())],
        params=_params(given["params"]),
        filter=_filter(given["filter"]) if "filter" in given else None,
    )


def _params(given: Json) -> "edge.SearchParams":
    codes = given.get("quantization")
    quantisation = None if codes is None else edge.QuantizationSearchParams(**codes)
    return edge.SearchParams(given.get("hnsw_ef"), given.get("exact", False), quantisation)


def _filter(given: Json) -> "edge.Filter":
    parts = {word: [_condition(one) for one in some] for word, some in given.items()}
    return edge.Filter(parts.get("must"), parts.get("should"), parts.get("must_not"))


def _condition(given: Json) -> Any:
    match given:
        case {"has_id": ids}:
            return edge.HasIdCondition({UUID(one) for one in ids})
        case {"has_vector": name}:
            return edge.HasVectorCondition(name)
        case {"is_empty": {"key": path}}:
            return edge.IsEmptyCondition(path)
        case {"key": path, "range": limits}:
            return edge.FieldCondition(path, range=edge.RangeFloat(**limits))
        case {"key": path, "match": {"any": values}}:
            return edge.FieldCondition(path, match=edge.MatchAny(values))
        case {"key": path, "match": {"value": value}}:
            return edge.FieldCondition(path, match=edge.MatchValue(value))
    return _filter(given)


def _answer(record: "edge.Record") -> Answer:
    vectors: Any = record.vector
    return Answer(str(record.id), 0.0, record.payload or {}, vectors or {})
