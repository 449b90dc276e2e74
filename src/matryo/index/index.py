"""`Index`: the verbs of every index, wherever it lies. `Index.create` and `Index.open` take a folder or a URL.

A folder is `matryo.index.folder.FolderIndex`, the embedded engine and the judge of all others. A URL names a database
that runs already; each has its own module in `matryo.engines` and its own extra.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matryo.core.errors import InputError
from matryo.core.plan import Plan
from matryo.core.promise import Floats, Promise
from matryo.index.hits import Hits
from matryo.index.items import Batch, Metadata
from matryo.index.report import CheckReport

ENGINES = {
    "postgresql": ("matryo.engines.postgres", "PostgresIndex"),
    "postgresql+shards": ("matryo.engines.postgres_shards", "PostgresShards"),
    "qdrant": ("matryo.engines.qdrant_server", "QdrantServerIndex"),
    "qdrant+edge": ("matryo.engines.qdrant_edge", "QdrantEdgeIndex"),
    "milvus": ("matryo.engines.milvus", "MilvusIndex"),
    "milvus+lite": ("matryo.engines.milvus", "MilvusLiteIndex"),
}
"""Scheme of a URL -> where the index of that engine is defined. Names alone: this room stands below theirs."""
FROM_ENVIRONMENT = "env:"


class Index(ABC):
    """An index of vectors, documents and metadata. Made by `Index.create` or `Index.open`; close it, or use `with`."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        width: int,
        plan: str | Plan | None = None,
        model: dict[str, Any] | None = None,
        store: str | None = None,
    ) -> "Index":
        """A new, empty index, open for writing. It appears whole or not at all.

        Args:
            path: a folder that does not exist yet, or is empty; or the URL of an engine, such as
                postgresql://host/database?table=docs, or env:NAME for a URL that an environment variable holds.
            width: full width of the vectors, at most 65,536; engines may allow less.
            plan: how to search unless a search says otherwise; by default a safe one for the width and the engine.
            model: what made the vectors (name, digest, nesting...), JSON; `open` can be told to insist on it.
            store: "float16" or "float32", how the full vectors are kept; by default float16 where the engine can.
                Scores are inner products of the unit query with the stored rows: with float16 they differ from those
                of float32 by less than 5e-4.

        Raises:
            InputError: something is there already; nothing of it is touched. MissingExtraError: the engine's driver.
            UnavailableError, AccessError: the engine does not answer, or does not let us in.
        """
        return _engine(path).create(path, width=width, plan=plan, model=model, store=store)

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False, model: dict[str, Any] | None = None) -> "Index":
        """Open an index; for writing, unless `read_only`.

        Args:
            path: a folder or a URL, as for `create`.
            model: what must have made the vectors: each entry must equal what `create` was given.

        Raises:
            InputError: no index there, or another model made its vectors.
            LockedError: another writer has it open.
            FormatError, DamagedError: it cannot be read safely.
            UnavailableError, AccessError: the engine does not answer, or does not let us in.
        """
        return _engine(path).open(path, read_only=read_only, model=model)

    @abstractmethod
    def upsert(
        self,
        ids: Sequence[str],
        vectors: Any,
        documents: Sequence[str | None] | None = None,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> int:
        """Write items, replacing whole items whose id is there already. When it returns, the batch survives a crash.

        Args:
            ids: N distinct non-empty texts.
            vectors: (N, width) numbers, any lengths but zero; stored as unit rows.
            documents: N texts or None. metadata: N flat dicts of JSON scalars or None.

        Returns:
            N. The batch is one commit: all of it is there, or (after any error) none, where the engine has commits.
        """

    @abstractmethod
    def extend(self, batches: Iterable[Batch], source: str | None = None) -> int:
        """Upsert batch after batch, each one commit, so that what is written need never be in memory as a whole.

        Args:
            batches: taken one at a time. An error, of theirs or of writing, leaves those before in the index.
            source: a text that tells this stream from others, such as a digest of the file it is read from. With it
                every commit notes how many rows of the source are in, and `read_from` says where to go on.

        Returns:
            How many items were written.
        """

    @abstractmethod
    def read_from(self, source: str) -> int:
        """How many rows of a source are in the index: where an `extend` that was cut off goes on.

        Raises:
            InputError: the index holds items already that came from elsewhere.
        """

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Delete items by id; the number that were there. Unknown ids are not an error."""

    @abstractmethod
    def search(
        self,
        queries: Any,
        k: int = 10,
        plan: str | Plan | None = None,
        where: dict[str, Any] | None = None,
        explain: bool = False,
        width: int | None = None,
    ) -> Hits:
        """The k best items for each query, by the index's plan or the one given, among those that match `where`.

        Args:
            queries: (Q, width) or (width,) numbers, any lengths but zero. One query gives one row of hits.
            k: at least 1. A stage never hands on fewer than k, whatever its `keep`.
            where: a metadata filter, see `matryo.index.where`. It acts inside the first stage.
            width: answer by the cosines of the first `width` dimensions alone, exactly, as an index of that width
                would; the scores are those cosines. It takes the place of a plan, and keeps nothing in memory.

        Raises:
            InputError: a query, the plan, the width or the filter is wrong. DamagedError: what it needed is damaged.
        """

    @abstractmethod
    def prepare(self, plan: str | Plan | None = None) -> None:
        """Derive all that a plan needs, by default the index's own, and return when it is there."""

    @abstractmethod
    def recalls(self, queries: Any, k: int = 10) -> Callable[[str | Plan], Floats]:
        """Plan -> recall@k of each query: (Q,) shares of the exact k best that a search by this plan would find.

        The exact answers are searched for once, now; both they and the plans are of this moment's items.

        Args:
            queries: (Q, width) numbers.
        """

    @abstractmethod
    def calibrate(
        self,
        queries: Any = None,
        recall: float = 0.95,
        confidence: float = 0.95,
        k: int = 10,
        plan: str | Plan | None = None,
    ) -> Promise:
        """Choose the shortest shortlists whose expected recall@k is promised on new queries; search then uses them.

        The plan with its promise is one commit: after a crash it is there whole, or the old plan is. The promise holds
        for queries from the same source as these, for this k, without a filter, on the items of this moment: calibrate
        again when the index has grown (`search(explain=True)` says so). See `matryo.core.promise` for the statistics.

        Args:
            queries: (Q, width) numbers, a sample of the users' queries; some hundreds. None asks up to 1,000 of the
                items instead, each with itself removed from the answers; the promise then is about such queries only.
            recall: share of the exact k best that is to be found in expectation, between 0 and 1.
            confidence: how sure, over the draw of the sample, between 0 and 1.
            plan: the plan whose shortlists are chosen, by default the index's own. Where it has several, they grow in
                proportion.

        Raises:
            InputError: too few queries (says how many are needed), a target out of reach (says what is reachable), no
                more items than k.
        """

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """What the index is and how many bytes it takes: `items`, `width`, `plan`, `promise`, `model`, and more."""

    @abstractmethod
    def check(self) -> CheckReport:
        """Verify what can be verified; says what is damaged instead of raising."""

    @abstractmethod
    def compact(self, store: str | None = None) -> int:
        """Give back the space of what was deleted and derive codes anew; the number of rows dropped.

        Args:
            store: "float16" or "float32" to change how the full vectors are kept; by default as they are.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every file and connection; harmless twice."""

    @abstractmethod
    def __len__(self) -> int: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def scheme_of(path: str | Path) -> str | None:
    """The scheme of a URL, "env" for one that the environment holds; None for a folder."""
    text = str(path)
    if text.startswith(FROM_ENVIRONMENT):
        return "env"
    return text.split("://", 1)[0] if "://" in text else None


def _engine(path: str | Path) -> type[Index]:
    scheme = scheme_of(path)
    if scheme == "env":
        from os import environ

        name = str(path).removeprefix(FROM_ENVIRONMENT)
        scheme = scheme_of(environ.get(name, "")) or ""
        if scheme in ("", "env"):
            raise InputError(f"{path}: the environment variable {name!r} holds no URL; set it to one of {_known()}")
    if scheme is None:
        from matryo.index.folder import FolderIndex

        return FolderIndex
    if scheme == "postgres":
        scheme = "postgresql"
    if scheme not in ENGINES:
        raise InputError(f"{scheme}:// is not an engine of this release; give the path of a folder, or {_known()}")
    module, name = ENGINES[scheme]
    found: type[Index] = getattr(importlib.import_module(module), name)
    return found


def _known() -> str:
    return ", ".join(f"{scheme}://" for scheme in ENGINES)
