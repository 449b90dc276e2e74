"""A Qdrant server or cluster as an index: `qdrant://host:6334/docs`, over gRPC.

The key comes from QDRANT_API_KEY, or the file that QDRANT_API_KEY_FILE names, and goes over TLS unless the URL says
`tls=no`. Writes wait until the server has applied them. A batch is sent in requests of some megabytes, each a commit
of every shard it touches; the note follows them.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from matryo.core.errors import (
    AccessError,
    FormatError,
    InputError,
    MissingExtraError,
    NoIndexError,
    StorageError,
    UnavailableError,
)
from matryo.engines import qdrant_requests as words
from matryo.engines.address import Address, read_address
from matryo.engines.base import Can, Note, TransientError
from matryo.engines.qdrant import Answer, QdrantIndex
from matryo.engines.qdrant_requests import Json, Vectors
from matryo.index.funnel import Float32s

try:
    import grpc
    from qdrant_client import QdrantClient, models
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ApiException
except ImportError as error:
    raise MissingExtraError("qdrant-client", "qdrant", "an index in a Qdrant server") from error

SECRET = "QDRANT_API_KEY"
PORT = 6334
OPTIONS = {"tls": "yes or no; by default yes where there is a key", "timeout": "seconds, 60 by default"}
NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
SENT = 8 << 20
"""Bytes of vectors sent at a time."""
SETTLED_WITHIN = 24 * 3600
"""Seconds that `prepare` waits for codes and graphs."""


class ServerAddress(Address):
    """A collection of a server."""

    def __str__(self) -> str:
        ((host, port),) = self.hosts
        query = "&".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.scheme}://{host}:{port or PORT}/{self.path}" + (f"?{query}" if query else "")


class QdrantServerIndex(QdrantIndex):
    """An index in a Qdrant server."""

    can: ClassVar[Can] = replace(QdrantIndex.can, commits=False)
    _client: QdrantClient | None = None
    _begun = False

    @classmethod
    def _create(cls, path: str | Path, note: Note) -> Self:
        made = cls(_address(path), cls._noted(note), False)
        try:
            made._client = connect(made.address)
            made._trying(made._make)
        except BaseException:
            made.close()
            raise
        return made

    def _make(self) -> None:
        name = self.address.path
        with self._reaching() as client:
            there = client.collection_exists(name)
            # An empty one may be our own, of an attempt whose answer was lost.
            if there and not (self._begun and self._matching(None) == 0):
                raise InputError(
                    f"{self.address}: there is a collection of this name already; open it with Index.open, or choose "
                    "another name"
                )
            self._begun = True
            if not there:
                given = words.configs(self._vectors(self._note))
                client.create_collection(name, {n: models.VectorParams.model_validate(one) for n, one in given.items()})
        try:
            self._write_note(self._note)
        except BaseException:
            with suppress(Exception), self._reaching() as client:
                client.delete_collection(name)
            raise

    @classmethod
    def _open(cls, path: str | Path, read_only: bool) -> Self:
        opened = cls(_address(path), Note(1, "1:float32", "float32"), read_only)
        try:
            opened._client = connect(opened.address)
            return opened._opened()
        except BaseException:
            opened.close()
            raise

    def close(self) -> None:
        """Close every connection; harmless twice."""
        super().close()
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _query(self, requests: list[Json]) -> list[list[Answer]]:
        with self._reaching() as client:
            found = client.query_batch_points(
                self.address.path, [models.QueryRequest.model_validate(one) for one in requests]
            )
        return [[Answer(str(p.id), p.score, p.payload or {}) for p in one.points] for one in found]

    def _put(self, points: list[Json], note: Json | None) -> None:
        numbers = sum(map(len, points[0]["vector"].values())) if points else 1
        size = max(1, SENT // (4 * numbers))
        parts = [points[n : n + size] for n in range(0, len(points), size)]
        for part in [*parts, *([[note]] if note is not None else [])]:
            with self._reaching() as client:
                client.upsert(self.address.path, [models.PointStruct.model_validate(one) for one in part])

    def _get(self, ids: list[str]) -> list[Answer]:
        with self._reaching() as client:
            return [_answer(one) for one in client.retrieve(self.address.path, ids)]

    def _page(self, where: Json, offset: str | None, limit: int, vectors: list[str]) -> list[Answer]:
        with self._reaching() as client:
            found, _ = client.scroll(self.address.path, _filter(where), limit, offset=offset, with_vectors=vectors)
        return [_answer(one) for one in found]

    def _matching(self, where: Json | None) -> int:
        with self._reaching() as client:
            return client.count(self.address.path, None if where is None else _filter(where), exact=True).count

    def _drop(self, ids: list[str]) -> None:
        with self._reaching() as client:
            client.delete(self.address.path, models.PointIdsList(points=list(ids)))

    def _fill(self, ids: list[str], vectors: dict[str, Float32s]) -> None:
        points = [
            models.PointVectors(id=one, vector={name: rows[n].tolist() for name, rows in vectors.items()})
            for n, one in enumerate(ids)
        ]
        with self._reaching() as client:
            client.update_vectors(self.address.path, points)

    def _add(self, vectors: Vectors, names: list[str]) -> None:
        there, given = self._sizes(), words.configs(vectors)
        for name in names:
            if name not in there:
                space = {part: given[name][part] for part in ("size", "distance", "datatype")}
                made = models.DenseVectorNameConfig.model_validate({"dense": space})
                with self._reaching() as client:
                    client.create_vector_name(self.address.path, name, made)
        rest = {
            name: {k: v for k, v in given[name].items() if k not in ("size", "distance", "datatype")} for name in given
        }
        changed = {name: models.VectorParamsDiff.model_validate(one) for name, one in rest.items()}
        with self._reaching() as client:
            client.update_collection(self.address.path, vectors_config=changed)

    def _index_fields(self, kinds: dict[str, str]) -> None:
        for path, kind in kinds.items():
            with self._reaching() as client:
                client.create_payload_index(self.address.path, path, models.PayloadSchemaType(kind))

    def _indexed_fields(self) -> set[str]:
        with self._reaching() as client:
            return set(client.get_collection(self.address.path).payload_schema)

    def _settle(self) -> None:
        """The server optimises by itself; wait until it says that it is done."""
        end, wait = time.monotonic() + SETTLED_WITHIN, 0.05
        while True:
            with self._reaching() as client:
                status = client.get_collection(self.address.path).status
            if status == models.CollectionStatus.RED:
                raise StorageError(f"{self.address}: the server's optimisation failed; see its log")
            if status != models.CollectionStatus.YELLOW:  # grey waits for a next write
                return
            if time.monotonic() > end:
                raise UnavailableError(f"{self.address} was still optimising after {SETTLED_WITHIN} s")
            time.sleep(wait)
            wait = min(2 * wait, 2.0)

    def _sizes(self) -> dict[str, int]:
        with self._reaching() as client:
            found = client.get_collection(self.address.path).config.params.vectors
        if not isinstance(found, dict):
            raise FormatError(f"{self.address} was not made by Matryo: its vectors have no names; choose another name")
        return {name: one.size for name, one in found.items()}

    def _occupied(self) -> Json:
        with self._reaching() as client:
            told = client.get_collection(self.address.path)
        return {
            "status": str(told.status),
            "segments": told.segments_count,
            "indexed_vectors": told.indexed_vectors_count,
        }

    @contextmanager
    def _reaching(self) -> Iterator[QdrantClient]:
        """The client, and its errors as ours."""
        self._refuse_closed()
        assert self._client is not None
        try:
            yield self._client
        except grpc.RpcError as error:
            self._raise_status(error)
        except ResourceExhaustedResponse as error:
            raise TransientError(str(error)) from error
        except ApiException as error:
            raise TransientError(self.address.clean(error)) from error
        except ValueError as error:
            # Only the client's own engine, which stands in for a server, says it like this.
            if "not found" in str(error):
                raise NoIndexError(_absent(self.address)) from error
            raise

    def _raise_status(self, error: Any) -> None:
        code, said = error.code(), self.address.clean(error.details() or error.code())
        match code:
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                raise AccessError(
                    f"{self.address}: {said}; set {SECRET} or {SECRET}_FILE to a key that may do this"
                ) from error
            case grpc.StatusCode.NOT_FOUND:
                raise NoIndexError(_absent(self.address)) from error
            case grpc.StatusCode.ALREADY_EXISTS:
                raise InputError(f"{self.address}: {said}; choose another name") from error
            case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.FAILED_PRECONDITION:
                raise FormatError(f"{self.address} refused what was sent ({said}); was it changed by hand?") from error
            case grpc.StatusCode.UNIMPLEMENTED:
                raise InputError(f"{self.address}: its server cannot do this ({said}); update it") from error
            case grpc.StatusCode.INTERNAL | grpc.StatusCode.DATA_LOSS | grpc.StatusCode.UNKNOWN:
                raise StorageError(f"{self.address}: the server failed ({said}); see its log") from error
        raise TransientError(said) from error


def connect(address: Address) -> QdrantClient:
    """A client; nothing is sent yet."""
    ((host, port),) = address.hosts
    tls = address.options.get("tls", "yes" if address.secret else "no") == "yes"
    # The key goes as a header, as the client warns of one without TLS even where that was asked for.
    return QdrantClient(
        host=host,
        grpc_port=port or PORT,
        prefer_grpc=True,
        https=tls,
        headers={"api-key": address.secret} if address.secret else None,
        timeout=int(address.options.get("timeout", "60")),
        check_compatibility=False,
    )


def _address(path: str | Path) -> ServerAddress:
    found = ServerAddress(**vars(read_address(path, allowed=OPTIONS, secret=SECRET)))
    if len(found.hosts) != 1 or found.user is not None:
        raise InputError(f"{found.scheme}:// takes one host and no user: {found.scheme}://host:{PORT}/docs")
    if not NAME.fullmatch(found.path):
        raise InputError(
            f"{found}: the path names the collection and must be letters, digits, _ and - (at most 200), got "
            f"{found.path!r}"
        )
    if found.options.get("tls", "yes") not in ("yes", "no"):
        raise InputError(f"{found}: tls is yes or no, got {found.options['tls']!r}")
    if not found.options.get("timeout", "60").isdecimal() or int(found.options.get("timeout", "60")) < 1:
        raise InputError(f"{found}: timeout must be whole seconds, got {found.options['timeout']!r}")
    return found


def _absent(address: Address) -> str:
    return f"{address} holds no index; make one with Index.create(url, width=...)"


def _filter(given: Json) -> models.Filter:
    return models.Filter.model_validate(given)


def _answer(record: Any) -> Answer:
    return Answer(str(record.id), 0.0, record.payload or {}, record.vector or {})
