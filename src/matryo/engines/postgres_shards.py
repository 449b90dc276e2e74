"""Several PostgreSQL servers as shards of one index: `postgresql+shards://user@host1,host2:5433/database?table=docs`.

Each shard is a table as `postgres` makes it. An item lies on the shard that a hash of its id names, so an upsert
replaces it wherever it is. A search runs the whole plan on every shard at once, one statement each, and the answers are
merged by score, then id. A plan's `keep` holds on each shard, so that a search finds at least what one server would.

The note of every shard says which it is, of how many, and of which index; the plan and its promise are those of the
first shard. A batch is one commit on each shard, not one over all of them: what a crash or an absent shard cut off is
completed by writing it again, and `read_from` goes on where the shard that is furthest behind is.

Letters in array names: N items, Q queries, D full width.
"""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from matryo.core.errors import FormatError, InputError, MatryoError, NoIndexError
from matryo.core.plan import Plan
from matryo.engines.address import read_address
from matryo.engines.base import Asked, Can, EngineIndex, Found, Note, TransientError
from matryo.engines.postgres import OPTIONS, SECRET, SHARDS, PostgresIndex
from matryo.index.funnel import Float32s, StageReport
from matryo.index.report import CheckReport

T = TypeVar("T")
AT_ONCE = 32
"""Searches that may be under way at once before one waits for another."""
UNKNOWN = Note(1, "1:float32", "float32")


def shard_of(key: str, shards: int) -> int:
    """The shard an id lies on: BLAKE2b-64 of its UTF-8, big-endian, modulo their number. Part of the format."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) % shards


class PostgresShards(EngineIndex):
    """An index over several PostgreSQL servers."""

    can: ClassVar[Can] = replace(PostgresIndex.can, commits=False, ordered=False)

    def __init__(self, path: str | Path, note: Note, read_only: bool) -> None:
        allowed = {name: what for name, what in OPTIONS.items() if name != "host"}
        address = read_address(path, allowed=allowed, secret=SECRET)
        super().__init__(address, note, read_only)
        hosts = address.hosts
        if not hosts or len(set(hosts)) < len(hosts):
            raise InputError(
                f"{address} must name each server once, as host:port or as the percent-encoded folder of a socket: "
                "postgresql+shards://host1,host2:5433,%2Frun%2Fpg3/database?table=..."
            )
        self.shards = [
            PostgresIndex(replace(address, scheme="postgresql", hosts=(host,)), note, read_only) for host in hosts
        ]
        for shard in self.shards:
            shard.tie = "id"
        self._pool = ThreadPoolExecutor(AT_ONCE * len(hosts), thread_name_prefix="matryo-shard")

    @classmethod
    def default_plan(cls, width: int) -> Plan:
        return PostgresIndex.default_plan(width)

    @classmethod
    def check_plan(cls, plan: str | Plan, width: int) -> Plan:
        return PostgresIndex.check_plan(plan, width)

    @classmethod
    def _create(cls, path: str | Path, note: Note) -> Self:
        made = cls(path, note, False)
        identity, of = uuid.uuid4().hex, len(made.shards)
        for n, shard in enumerate(made.shards):
            shard._note = replace(note, extra={SHARDS: {"index": identity, "of": of, "this": n}})
        made._note = made.shards[0]._note
        return made._made(made._make)

    def _make(self) -> None:
        """One transaction on every shard, committed when all are made, the first shard last."""
        try:
            with ExitStack() as commits:
                for shard in self.shards:
                    connection = commits.enter_context(shard._transaction())
                    connection.execute("SET LOCAL lock_timeout = '10s'")  # two creators in opposite orders
                    shard.drop_in(connection)  # left by a commit whose answer was lost
                    shard.make_in(connection)
        except BaseException:
            for shard in self.shards:
                with suppress(MatryoError, TransientError), shard._transaction() as connection:
                    shard.drop_in(connection)
            raise

    @classmethod
    def _open(cls, path: str | Path, read_only: bool) -> Self:
        opened = cls(path, UNKNOWN, read_only)
        try:
            opened._recognise()
        except BaseException:
            opened.close()
            raise
        return opened

    def _recognise(self) -> None:
        """Read every shard's note, and refuse what is not the whole of one index in its order."""

        def read(shard: PostgresIndex) -> Note | None:
            try:
                return shard._latest()
            except NoIndexError:
                return None

        notes = self._each(read)
        if not any(notes):
            raise NoIndexError(f"{self.address} holds no index; make one with Index.create(url, width=...)")
        identity = None
        for n, (shard, note) in enumerate(zip(self.shards, notes, strict=True)):
            if note is None:
                table = self.address.name
                raise FormatError(
                    f"{shard.address} holds no index, but other shards of {self.address} do. Either the URL names "
                    "another server than before, or creating the index was cut off: then it holds nothing yet, and "
                    f"DROP TABLE {table}; DELETE FROM matryo_indexes WHERE name = '{table}' on those makes room"
                )
            part = note.extra.get(SHARDS)
            if part is None:
                raise InputError(f"{shard.address} is an index of its own, no shard; open it by this URL")
            if part["of"] != len(self.shards):
                raise InputError(
                    f"{shard.address} is one of {part['of']} shards, but the URL names {len(self.shards)}; name them "
                    "all, in the order of the URL that made the index"
                )
            identity = identity or part["index"]
            if part["index"] != identity:
                raise InputError(
                    f"{shard.address} is a shard of another index than {self.shards[0].address}; name the servers that "
                    "the index was made on, in that order"
                )
            if part["this"] != n:
                raise InputError(
                    f"{shard.address} is shard {part['this'] + 1} of {part['of']}, but the URL names it as number "
                    f"{n + 1}; name the servers in the order of the URL that made the index"
                )
        self._note = self.shards[0]._note

    def _each(self, call: Callable[[PostgresIndex], T]) -> list[T]:
        """Call on all shards at once. What one of them raises is raised when all have ended."""
        return self._each_of([(call, shard) for shard in self.shards])

    def _each_of(self, calls: list[tuple[Callable[[PostgresIndex], T], PostgresIndex]]) -> list[T]:
        first, *others = calls
        pending = [self._pool.submit(call, shard) for call, shard in others]
        try:
            found = first[0](first[1])
        finally:
            wait(pending)
        return [found, *(one.result() for one in pending)]

    def _places(self, keys: list[str]) -> list[list[int]]:
        """Positions of the ids that lie on each shard."""
        places: list[list[int]] = [[] for _ in self.shards]
        for place, key in enumerate(keys):
            places[shard_of(key, len(places))].append(place)
        return places

    def _write(
        self,
        keys: list[str],
        units_ND: Float32s,
        documents: list[str | None],
        metadata: list[str | None],
        source: dict[str, Any] | None,
    ) -> None:
        def written(places: list[int]) -> Callable[[PostgresIndex], None]:
            mine, rows = [keys[i] for i in places], units_ND[places]
            texts, fields = [documents[i] for i in places], [metadata[i] for i in places]
            return lambda shard: shard._trying(lambda: shard._write(mine, rows, texts, fields, source))

        # A shard without items of this batch notes the source all the same: how far it is counts.
        wanted = [
            (written(places), shard)
            for places, shard in zip(self._places(keys), self.shards, strict=True)
            if places or source is not None
        ]
        self._each_of(wanted)

    def read_from(self, source: str) -> int:
        self._refuse_closed()
        return min(self._each(lambda shard: shard.read_from(source)))

    def _remove(self, keys: list[str]) -> int:
        def removed(places: list[int]) -> Callable[[PostgresIndex], int]:
            mine = [keys[i] for i in places]
            return lambda shard: shard._trying(lambda: shard._remove(mine))

        return sum(self._each_of([(removed(p), s) for p, s in zip(self._places(keys), self.shards, strict=True) if p]))

    def _find(self, asked: Asked) -> tuple[list[Found], list[StageReport] | None]:
        answers = self._each(lambda shard: shard._trying(lambda: shard._find(asked)))
        found = [merged([one[q] for one, _ in answers], asked.k) for q in range(len(asked.units))]
        if not asked.explain:
            return found, None
        told = zip(*(reports for _, reports in answers if reports is not None), strict=True)
        reports = [_together(parts) for parts in told]
        each = [len(one.ids) for one in found]
        reports[-1] = replace(reports[-1], kept=sum(each), each=each)
        return found, reports

    def _count(self) -> int:
        return sum(self._each(len))

    def _sample(self, n: int, seed: int) -> tuple[list[str], Float32s]:
        counts = self._each(len)
        wanted = [-(-n * count // sum(counts)) for count in counts]

        def drawn(share: int) -> Callable[[PostgresIndex], tuple[list[str], Float32s]]:
            return lambda shard: shard._trying(lambda: shard._sample(share, seed))

        parts = self._each_of([(drawn(s), shard) for s, shard in zip(wanted, self.shards, strict=True) if s])
        return [key for keys, _ in parts for key in keys][:n], np.concatenate([rows for _, rows in parts])[:n]

    def _read_note(self) -> Note:
        return self.shards[0]._read_note()

    def _write_note(self, note: Note) -> None:
        self.shards[0]._write_note(note)

    def prepare(self, plan: str | Plan | None = None) -> None:
        """Build on every shard, at once, the index that the plan's first stage scans."""
        noted = self._latest()
        chosen = self.check_plan(noted.plan if plan is None else plan, noted.width)
        self._each(lambda shard: shard.prepare(chosen))

    def _occupied(self) -> dict[str, Any]:
        each = self._each(lambda shard: shard.stats())
        names = {name for one in each for name in one["index_bytes"]}
        return {
            "table_bytes": sum(one["table_bytes"] for one in each),
            "index_bytes": {name: sum(one["index_bytes"].get(name, 0) for one in each) for name in sorted(names)},
            "shards": [
                {"address": str(shard.address), "items": one["items"], "table_bytes": one["table_bytes"]}
                for shard, one in zip(self.shards, each, strict=True)
            ],
        }

    def check(self) -> CheckReport:
        """Read every row of every shard, and see that each item lies on the shard of its id."""
        self._refuse_closed()
        each = self._each(lambda shard: shard.check())
        lost = self._each(self._strays)
        problems = [problem for one in each for problem in one.problems]
        problems += [
            f"{shard.address} holds {len(keys)} items that belong on other shards, such as {keys[0]!r}"
            for shard, keys in zip(self.shards, lost, strict=True)
            if keys
        ]
        return CheckReport(tuple(str(shard.address) for shard in self.shards), tuple(problems), ())

    def _strays(self, shard: PostgresIndex) -> list[str]:
        """Ids on this shard that a search finds but an upsert would not replace."""
        here = self.shards.index(shard)
        return shard._trying(lambda: [key for key in shard.ids() if shard_of(key, len(self.shards)) != here])

    def compact(self, store: str | None = None) -> int:
        """VACUUM and ANALYZE on every shard; the servers' estimate of the dead rows there were."""
        self._refuse_reading()
        return sum(self._each(lambda shard: shard.compact(store)))

    def close(self) -> None:
        """Close every connection to every shard; harmless twice."""
        super().close()
        self._pool.shutdown()
        for shard in self.shards:
            shard.close()


def merged(parts: list[Found], k: int) -> Found:
    """The k best of all shards' answers to one query, by score, then id."""
    rows = [row for part in parts for row in zip(part.ids, part.scores, part.documents, part.metadata, strict=True)]
    rows.sort(key=lambda row: (-row[1], row[0]))
    columns = list(zip(*rows[:k], strict=True)) or [(), (), (), ()]
    return Found(*(list(column) for column in columns))


def _together(parts: tuple[StageReport, ...]) -> StageReport:
    """What a stage did on all shards, which ran side by side."""
    return StageReport(
        parts[0].stage,
        sum(part.considered for part in parts),
        sum(part.kept for part in parts),
        max(part.milliseconds for part in parts),
        [sum(each) for each in zip(*(part.each for part in parts), strict=True)],
    )
