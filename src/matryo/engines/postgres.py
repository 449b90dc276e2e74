"""PostgreSQL with pgvector (0.8 or later) as an index: `postgresql://user@host:5432/database?table=docs`.

One table of items and one row in `matryo_indexes` per index. Every batch is one transaction. Graphs and cells are
expression indexes on the prefix, built by `prepare` without locking out readers or writers; until they are there the
same statement scans exactly. The password comes from MATRYO_POSTGRES_PASSWORD (or ..._FILE), PGPASSWORD or ~/.pgpass.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from matryo.core.errors import (
    AccessError,
    FormatError,
    InputError,
    MissingExtraError,
    NoIndexError,
    StorageError,
)
from matryo.core.plan import Plan, Stage
from matryo.engines.address import Address, read_address
from matryo.engines.base import Asked, Can, EngineIndex, Found, Note, TransientError
from matryo.index.funnel import Float32s, StageReport
from matryo.index.report import CheckReport

try:
    import psycopg
    from psycopg import errors, sql
    from psycopg.pq import TransactionStatus
except ImportError as error:
    raise MissingExtraError("psycopg", "postgres", "an index in PostgreSQL") from error

from matryo.engines import postgres_sql as words

OPTIONS = {
    "table": "name of the index",
    "host": "folder of the server's socket, for a URL without a host",
    "sslmode": "as libpq: verify-full checks the server's certificate",
    "sslrootcert": "file of certificates",
    "sslcert": "file of the client's own certificate",
    "sslkey": "file of its key",
    "connect_timeout": "seconds",
    "statement_timeout": "milliseconds",
}
SECRET = "MATRYO_POSTGRES_PASSWORD"
OLDEST = (0, 8)
NOTES = sql.Identifier("matryo_indexes")
WIDEST_INDEX = {"float32": 2000, "float16": 4000, "binary": 64_000}
"""Dimensions that pgvector's hnsw and ivfflat take, by code."""
EF_MOST = 1000
"""The largest hnsw.ef_search; beyond, the scan goes on iteratively."""
PLAIN_BYTES = 6000
"""Vectors up to this size stay in their row's page, so that a rerank reads one page an item."""
CODES = ("float32", "float16", "binary")
GONE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
"""A machine that vanished from the network is noticed within a minute; one that is slow is waited for."""
READ = 10_000
"""Ids read at a time."""
SHARDS = "shards"
"""In the note of a table that is a part of an index: which, of how many, of what index (see `postgres_shards`)."""


class PostgresIndex(EngineIndex):
    """An index in PostgreSQL."""

    can: ClassVar[Can] = Can(
        "PostgreSQL", {"flat": CODES, "hnsw": CODES, "ivf": CODES}, CODES, widest=16_000, kept=("float16", "float32")
    )

    def __init__(self, address: Address, note: Note, read_only: bool) -> None:
        super().__init__(address, note, read_only)
        self.tie = "row"
        """Column that orders equal scores."""
        self._idle: list[psycopg.Connection[Any]] = []
        self._guard = threading.Lock()

    @property
    def _table(self) -> sql.Identifier:
        return sql.Identifier(self.address.name)

    @classmethod
    def default_plan(cls, width: int) -> Plan:
        narrow = min(width, 256)
        if narrow == width:
            return Plan((Stage(width, "float32"),))
        graph = Stage(narrow, "float16", "hnsw", (("M", 16), ("ef", 200)), keep=200)
        return Plan((graph, Stage(width, "float32")))

    @classmethod
    def check_plan(cls, plan: str | Plan, width: int) -> Plan:
        chosen = super().check_plan(plan, width)
        first = chosen.stages[0]
        if first.scan != "flat" and first.width > WIDEST_INDEX[first.code]:
            raise InputError(
                f"stage 1 ({first}): pgvector builds {first.scan} over at most {WIDEST_INDEX[first.code]} dimensions "
                f"of {first.code}; take a shorter prefix"
            )
        if dict(first.options).get("at", first.width) != first.width:
            raise InputError(f"stage 1 ({first}): PostgreSQL sorts and scans by the same prefix; leave `at` out")
        return chosen

    @classmethod
    def _create(cls, path: str | Path, note: Note) -> Self:
        made = cls(_address(path), note, False)
        return made._made(made._make)

    def _make(self) -> None:
        with self._transaction() as connection:
            self.make_in(connection)

    def make_in(self, connection: "psycopg.Connection[Any]") -> None:
        """Make the index in a transaction of the caller's; an InputError if it is there already."""
        note, kind = self._note, words.TYPES[self._note.store]
        size = note.width * (2 if note.store == "float16" else 4)
        _vector_extension(connection, self.address)
        connection.execute(
            sql.SQL("CREATE TABLE IF NOT EXISTS {} (name text PRIMARY KEY, note text NOT NULL)").format(NOTES)
        )
        taken = connection.execute("SELECT to_regclass(%s)", [f'"{self.address.name}"']).fetchone()
        if taken is not None and taken[0] is not None:
            raise InputError(
                f"{self.address}: there is a table of this name already; open it with Index.open, or choose "
                "another with ?table="
            )
        connection.execute(
            sql.SQL(
                'CREATE TABLE {} (row bigint GENERATED ALWAYS AS IDENTITY, id text COLLATE "C" PRIMARY KEY, '
                "document text, metadata jsonb, vector {} NOT NULL)"
            ).format(self._table, sql.SQL(f"{kind}({note.width})"))
        )
        storage = "PLAIN" if size <= PLAIN_BYTES else "EXTERNAL"
        connection.execute(sql.SQL("ALTER TABLE {} ALTER COLUMN vector SET STORAGE " + storage).format(self._table))
        connection.execute(
            sql.SQL("CREATE INDEX {} ON {} USING gin (metadata jsonb_path_ops)").format(
                sql.Identifier(f"{self.address.name}_metadata"), self._table
            )
        )
        connection.execute(sql.SQL("INSERT INTO {} VALUES (%s, %s)").format(NOTES), [self.address.name, note.as_text()])

    def drop_in(self, connection: "psycopg.Connection[Any]") -> None:
        """Take back, in a transaction of the caller's, what `make_in` made: only while the note is this very one."""
        there = connection.execute("SELECT to_regclass('matryo_indexes')").fetchone()
        if there is None or there[0] is None:
            return
        gone = connection.execute(
            sql.SQL("DELETE FROM {} WHERE name = %s AND note = %s").format(NOTES),
            [self.address.name, self._note.as_text()],
        )
        if gone.rowcount:
            connection.execute(sql.SQL("DROP TABLE {}").format(self._table))

    @classmethod
    def _open(cls, path: str | Path, read_only: bool) -> Self:
        opened = cls(_address(path), Note(1, "1:float32", "float32"), read_only)
        try:
            part = opened._latest().extra.get(SHARDS)
            if part is not None:
                raise InputError(
                    f"{opened.address} is shard {part['this'] + 1} of {part['of']} of one index; open it whole, with "
                    "all its servers: postgresql+shards://host1,host2/database?table=..."
                )
        except BaseException:
            opened.close()
            raise
        return opened

    def _read_note(self) -> Note:
        query, found = sql.SQL("SELECT note FROM {} WHERE name = %s").format(NOTES), None
        # Read before every search by the index's own plan: one way there and back.
        with self._connected() as connection, suppress(errors.UndefinedTable):
            with connection.pipeline(), connection.transaction():
                cursor = connection.execute(query, [self.address.name])
            found = cursor.fetchone()
        if found is None:
            raise NoIndexError(f"{self.address} holds no index; make one with Index.create(url, width=...)")
        return Note.read(found[0], self.address)

    def _write_note(self, note: Note) -> None:
        with self._transaction() as connection:
            self._put_note(connection, note)

    def _put_note(self, connection: "psycopg.Connection[Any]", note: Note) -> None:
        connection.execute(
            sql.SQL("UPDATE {} SET note = %s WHERE name = %s").format(NOTES), [note.as_text(), self.address.name]
        )

    def _write(
        self,
        keys: list[str],
        units_ND: Float32s,
        documents: list[str | None],
        metadata: list[str | None],
        source: dict[str, Any] | None,
    ) -> None:
        columns = sql.SQL("(id, document, metadata, vector)")
        with self._transaction() as connection:
            if keys:
                known = connection.execute(
                    sql.SQL("SELECT 1 FROM {} WHERE id = ANY(%s) LIMIT 1").format(self._table), [keys]
                ).fetchone()
                # New ids alone are copied straight in; should another writer add one meanwhile, the key refuses it
                # and the batch is tried again.
                target = self._table if known is None else sql.Identifier("pg_temp", "matryo_batch")
                if known is not None:
                    connection.execute(
                        sql.SQL(
                            "CREATE TEMP TABLE matryo_batch ON COMMIT DROP AS "
                            "SELECT id, document, metadata, vector FROM {} WITH NO DATA"
                        ).format(self._table)
                    )
                with connection.cursor().copy(
                    sql.SQL("COPY {} {} FROM STDIN (FORMAT BINARY)").format(target, columns)
                ) as copy:
                    for block in words.copy_rows(keys, units_ND, documents, metadata, self._note.store):
                        copy.write(block)
                if known is not None:
                    connection.execute(
                        sql.SQL(
                            "INSERT INTO {} {} SELECT * FROM pg_temp.matryo_batch ON CONFLICT (id) DO UPDATE SET "
                            "row = DEFAULT, document = EXCLUDED.document, metadata = EXCLUDED.metadata, "
                            "vector = EXCLUDED.vector"
                        ).format(self._table, columns)
                    )
            if source is not None:
                fresh = sql.SQL("SELECT note FROM {} WHERE name = %s FOR UPDATE").format(NOTES)
                text = connection.execute(fresh, [self.address.name]).fetchone()
                if text is not None:
                    noted = Note.read(text[0], self.address)
                    self._put_note(connection, Note(**{**noted.__dict__, "source": source}))

    def _remove(self, keys: list[str]) -> int:
        with self._transaction() as connection:
            return connection.execute(sql.SQL("DELETE FROM {} WHERE id = ANY(%s)").format(self._table), [keys]).rowcount

    def _find(self, asked: Asked) -> tuple[list[Found], list[StageReport] | None]:
        cursors, started = [], time.perf_counter()
        # A pipeline: settings, statements and commit cross the wire together.
        with self._connected() as connection, connection.pipeline(), connection.transaction():
            self._set(connection, asked)
            for query in asked.units:
                if asked.width is not None:
                    statement, values = words.by_prefix(self._table, query, asked.width, asked.k, asked.where, self.tie)
                else:
                    statement, values = words.funnel(self._table, asked.plan, query, asked.k, asked.where, self.tie)
                cursors.append(connection.execute(statement, values))
        found = []
        for cursor in cursors:
            rows = cursor.fetchall()
            columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
            found.append(Found(*(list(column) for column in columns)))
        return found, self._reports(asked, found, 1e3 * (time.perf_counter() - started)) if asked.explain else None

    def _reports(self, asked: Asked, found: list[Found], milliseconds: float) -> list[StageReport]:
        """What each stage was told to keep; the statement is one, and its time is given with the last stage."""
        considered, reports = len(self) * len(found), []
        stages = asked.plan.stages
        for n, stage in enumerate(stages):
            last = n == len(stages) - 1
            limit = min(max(asked.k, stage.keep or asked.k), considered // max(1, len(found)))
            each = [len(one.ids) for one in found] if last else [limit] * len(found)
            reports.append(StageReport(str(stage), considered, sum(each), milliseconds if last else 0.0, each))
            considered = sum(each)
        return reports

    def _set(self, connection: "psycopg.Connection[Any]", asked: Asked) -> None:
        """Settings of this transaction: no graph may answer an exact scan, nor the reverse."""
        first = asked.plan.stages[0]
        if asked.width is not None or first.scan == "flat":
            connection.execute("SET LOCAL enable_indexscan = off")
            return
        options, keep = dict(first.options), max(first.keep or asked.k, asked.k)
        settings = {"enable_seqscan": "off"}
        if first.scan == "hnsw":
            settings["hnsw.ef_search"] = str(min(EF_MOST, max(options.get("ef", 40), keep)))
        else:
            settings["ivfflat.probes"] = str(options.get("probe", 1))
        if asked.where is not None or keep > EF_MOST:
            # The scan goes on until enough items match.
            settings[f"{'hnsw' if first.scan == 'hnsw' else 'ivfflat'}.iterative_scan"] = "relaxed_order"
        calls = sql.SQL(", ").join([sql.SQL("set_config(%s, %s, true)")] * len(settings))
        connection.execute(sql.SQL("SELECT {}").format(calls), [part for pair in settings.items() for part in pair])

    def prepare(self, plan: str | Plan | None = None) -> None:
        """Build the index that the plan's first stage scans, without locking readers or writers out."""
        noted = self._latest()
        first = self.check_plan(noted.plan if plan is None else plan, noted.width).stages[0]
        if first.scan == "flat":
            return
        options = dict(first.options)
        if first.scan == "hnsw":
            links = options.get("M", 16)
            method, settings, tag = "hnsw", f"m = {links}, ef_construction = {max(64, 2 * links)}", f"m{links}"
        else:
            cells = options.get("cells", 100)
            method, settings, tag = "ivfflat", f"lists = {cells}", f"cells{cells}"
        name = f"{self.address.name}_{first.width}{CODES.index(first.code)}{tag}"[:63]
        self._trying(lambda: self._build(name, first, method, settings))

    def _build(self, name: str, first: Stage, method: str, settings: str) -> None:
        with self._connected() as connection:
            connection.autocommit = True
            operators = sql.SQL(words.OPERATORS[first.code])
            try:
                state = connection.execute(
                    "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", [f'"{name}"']
                ).fetchone()
                if state is not None and state[0]:
                    return
                if state is not None:  # a build that was cut off
                    connection.execute(sql.SQL("DROP INDEX CONCURRENTLY {}").format(sql.Identifier(name)))
                connection.execute(
                    sql.SQL(
                        "CREATE INDEX CONCURRENTLY {} ON {} USING " + method + " (({}) {}) WITH (" + settings + ")"
                    ).format(sql.Identifier(name), self._table, words.expression(first), operators)
                )
            finally:
                if not connection.closed:
                    connection.autocommit = False

    def _count(self) -> int:
        with self._transaction() as connection:
            row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(self._table)).fetchone()
        return int(row[0]) if row else 0

    def ids(self) -> Iterator[str]:
        """Every id, in no order, never all in memory."""
        with self._transaction() as connection, connection.cursor("matryo_ids") as cursor:
            cursor.itersize = READ
            cursor.execute(sql.SQL("SELECT id FROM {}").format(self._table))
            for (key,) in cursor:
                yield key

    def _sample(self, n: int, seed: int) -> tuple[list[str], Float32s]:
        with self._transaction() as connection:
            rows = connection.execute(
                sql.SQL("SELECT id, vector::text FROM {} ORDER BY hashint8extended(row, %s) LIMIT %s").format(
                    self._table
                ),
                [seed, n],
            ).fetchall()
        return [key for key, _ in rows], np.stack([words.read_vector(text) for _, text in rows])

    def _occupied(self) -> dict[str, Any]:
        table, indexes = self._sizes()
        return {"table_bytes": table, "index_bytes": indexes}

    def _sizes(self) -> tuple[int, dict[str, int]]:
        """Bytes of the table, and of each index by its name."""
        name = f'"{self.address.name}"'
        with self._transaction() as connection:
            sizes = connection.execute(
                "SELECT c.relname, pg_relation_size(c.oid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
                "WHERE i.indrelid = to_regclass(%s)",
                [name],
            ).fetchall()
            table = connection.execute("SELECT pg_table_size(to_regclass(%s))", [name]).fetchone()
        return int(table[0]) if table else 0, {index: int(size) for index, size in sizes}

    def check(self) -> CheckReport:
        """Read every row; damage that the server's page checksums find is said here."""
        self._refuse_closed()
        every = sql.SQL("SELECT count(*) FROM {} WHERE octet_length(id) + vector_norm(vector::vector) < 0")

        def read() -> None:
            with self._transaction() as connection:
                connection.execute(every.format(self._table))

        problems = []
        try:
            self._trying(read)
        except (StorageError, FormatError, InputError) as error:
            problems.append(str(error))
        return CheckReport((self.address.name,), tuple(problems), ())

    def compact(self, store: str | None = None) -> int:
        """VACUUM and ANALYZE; the server's estimate of the dead rows there were."""
        self._refuse_reading()
        if store not in (None, self._note.store):
            raise InputError(
                f"{self.address} keeps its vectors as {self._note.store}; to keep them as {store} build a new index"
            )

        def vacuum() -> int:
            with self._connected() as connection:
                connection.autocommit = True
                try:
                    dead = connection.execute(
                        "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = to_regclass(%s)",
                        [f'"{self.address.name}"'],
                    ).fetchone()
                    connection.execute(sql.SQL("VACUUM (ANALYZE) {}").format(self._table))
                finally:
                    if not connection.closed:
                        connection.autocommit = False
                return int(dead[0]) if dead else 0

        return self._trying(vacuum)

    def close(self) -> None:
        """Close every connection; harmless twice."""
        super().close()
        with self._guard:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def _transaction(self) -> Iterator["psycopg.Connection[Any]"]:
        with self._connected() as connection, connection.transaction():
            yield connection

    @contextmanager
    def _connected(self) -> Iterator["psycopg.Connection[Any]"]:
        """A connection of its own for the caller, given back if it still works."""
        with self._guard:
            connection = self._idle.pop() if self._idle else None
        try:
            if connection is None:
                connection = _connect(self.address)
            yield connection
        except psycopg.Error as error:
            self._raise(error)
        finally:
            if connection is not None:
                with self._guard:
                    # One whose transaction failed in a pipeline may still be in it.
                    idle = connection.info.transaction_status == TransactionStatus.IDLE
                    keep = idle and not (self._closed or connection.closed or connection.broken)
                    if keep:
                        self._idle.append(connection)
                if not keep:
                    with suppress(psycopg.Error):
                        connection.close()

    def _raise(self, error: "psycopg.Error") -> None:
        said = self.address.clean(error)
        match error:
            case errors.DiskFull() | errors.OutOfMemory() | errors.DataCorrupted() | errors.IndexCorrupted():
                raise StorageError(
                    f"{self.address}: the server refused ({said}); what was acknowledged is there"
                ) from error
            case errors.InsufficientPrivilege() | errors.InvalidPassword() | errors.InvalidAuthorizationSpecification():
                raise AccessError(
                    f"{self.address}: {said}; ask for the right, or name another user in the URL"
                ) from error
            case errors.UndefinedTable() | errors.UndefinedColumn() | errors.DatatypeMismatch():
                raise FormatError(f"{self.address} is not a table that Matryo made, or was changed: {said}") from error
            case errors.QueryCanceled():
                raise StorageError(f"{self.address}: {said}; raise statement_timeout in the URL") from error
            case psycopg.OperationalError() | psycopg.InterfaceError() | errors.UniqueViolation():
                raise TransientError(said) from error
        raise error


def _address(path: str | Path) -> Address:
    return read_address(path, allowed=OPTIONS, secret=SECRET)


def _connect(address: Address) -> "psycopg.Connection[Any]":
    """A connection, or the reason why not: TransientError where another try may help."""
    options = dict(address.options)
    host = options.pop("host", None) or ",".join(name for name, _ in address.hosts)
    given: dict[str, Any] = {"connect_timeout": options.pop("connect_timeout", "10"), "application_name": "matryo"}
    given |= GONE
    timeout = options.pop("statement_timeout", None)
    if timeout is not None:
        if not timeout.isdecimal():
            raise InputError(f"{address}: statement_timeout must be whole milliseconds, got {timeout!r}")
        given["options"] = f"-c statement_timeout={timeout}"
    ports = [port for _, port in address.hosts]
    parts: dict[str, str | None] = {
        "host": host,
        "port": ",".join(str(port or "") for port in ports) if any(ports) else None,
        "dbname": address.path,
    }
    parts |= {"user": address.user, "password": address.secret}
    given |= options | {name: value for name, value in parts.items() if value}
    try:
        connection = psycopg.connect(**given)
        connection.adapters.register_dumper(words.Vector, words.VectorDumper)
        return connection
    except psycopg.OperationalError as error:
        said = address.clean(error)
        if any(mark in said for mark in ("authentication failed", "no password", "role ", "no pg_hba")):
            raise AccessError(
                f"{address}: {said}; name the user in the URL and set {SECRET}, {SECRET}_FILE or PGPASSWORD"
            ) from error
        if any(mark in said for mark in ("certificate", "does not support SSL", "private key")):
            raise AccessError(
                f"{address}: no encrypted connection ({said}); name the authority's certificates with sslrootcert= and "
                "the host as its certificate does"
            ) from error
        if "invalid sslmode" in said:
            raise InputError(f"{address}: {said}; verify-full checks all there is to check") from error
        if "database " in said and "does not exist" in said:
            raise InputError(f"{address}: {said}; create it, or name another in the URL") from error
        raise TransientError(said) from error


def _vector_extension(connection: "psycopg.Connection[Any]", address: Address) -> None:
    try:
        with connection.transaction():
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except psycopg.Error as error:
        raise InputError(
            f"{address}: the extension vector (pgvector {'.'.join(map(str, OLDEST))} or later) cannot be made there "
            f"({address.clean(error)}); install pgvector on the server and run CREATE EXTENSION vector as a superuser"
        ) from error
    row = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    version = str(row[0]) if row else "none"
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < OLDEST:
        raise InputError(
            f"{address} has pgvector {version}; 0.8 or later is needed: ALTER EXTENSION vector UPDATE, or upgrade it"
        )
