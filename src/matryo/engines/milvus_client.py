"""The connection to Milvus: addresses, the client, Milvus Lite in this process, and errors as ours."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from matryo.core.errors import (
    AccessError,
    DamagedError,
    FormatError,
    InputError,
    LockedError,
    MissingExtraError,
    NoIndexError,
    StorageError,
)
from matryo.engines.address import NAME, Address, read_address
from matryo.engines.base import TransientError

try:
    import grpc
    from pymilvus import MilvusClient, MilvusException
except ImportError as error:
    raise MissingExtraError("pymilvus", "milvus", "an index in Milvus") from error

T = TypeVar("T")

# The client logs a stack trace of every failure that it also raises; what is raised is told once.
for _name in ("pymilvus.decorators", "pymilvus.client"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

OPTIONS = {
    "consistency": "strong, session, bounded or eventually: what a search must see",
    "timeout": "seconds that one call may take",
    "tls": "1 to encrypt",
    "ca": "file of certificates, for tls",
}
SECRET = "MILVUS_TOKEN"
CONSISTENCY = {"strong": "Strong", "session": "Session", "bounded": "Bounded", "eventually": "Eventually"}
PATIENCE = 10.0
"""Seconds for one call, in which the client too tries again."""
DENIED = ("auth check", "permission deny", "permissiondenied", "privilege", "unauthenticated", "authenticat")
NOT_NOW = (
    "not ready", "unavailable", "not loaded", "not fully loaded", "recovering", "no available", "not available",
    "rate limit", "node not match", "node offline", "connection", "fail connecting", "timeout", "context canceled",
    "initializing", "closed channel", "no channel", "abnormal", "not healthy", "server id mismatch", "deadline",
    "retry run out",
)  # fmt: skip
"""What a server says that starts, stops, or moves data about."""
CONNECT_FAILED = 2
"""The client's code for no connection, and the server's for a service that is away."""
FULL_UP = ("quota", "no space", "disk full", "out of memory", "insufficient memory", "memory limit")


@dataclass(frozen=True)
class MilvusAddress(Address):
    """`path` is the database, or the file of Milvus Lite."""

    def __str__(self) -> str:
        hosts = ",".join(host if port is None else f"{host}:{port}" for host, port in self.hosts)
        user = f"{self.user}@" if self.user else ""
        query = "&".join(f"{name}={value}" for name, value in self.options.items())
        place = f"{self.path}/{self.name}" if self.path else self.name
        return f"{self.scheme}://{user}{hosts}/{place}" + (f"?{query}" if query else "")


class Connection:
    """A client, made when it is first needed, of the server that `where` names then."""

    def __init__(self, address: MilvusAddress, where: Callable[[], str]) -> None:
        self.address, self._where = address, where
        self._patience, self._level = _patience(address), _level(address)
        self._database = "" if address.scheme.endswith("lite") else address.path
        self._client: MilvusClient | None = None
        self._guard = threading.Lock()

    def ask(self, verb: str, *args: Any, timeout: float | None = None, **given: Any) -> Any:
        """One call of the client; reads see what the address says they must, unless told.

        Raises:
            TransientError: another try may help. Our own errors for everything else.
        """
        if verb in ("search", "query", "query_iterator"):
            given.setdefault("consistency_level", self._level)
        seconds = max(timeout or 0, self._patience)
        try:
            return self.said(lambda: getattr(self._connected(), verb)(*args, timeout=seconds, **given))
        except TransientError:
            self.close()  # a client whose server went away may not come back to life; the next try makes another
            raise

    def said(self, call: Callable[[], T]) -> T:
        """What a call answers, its errors as ours."""
        try:
            return call()
        except (MilvusException, grpc.RpcError) as error:
            raise_as_ours(self.address, error)

    def close(self) -> None:
        """Harmless twice."""
        with self._guard:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> MilvusClient:
        with self._guard:
            if self._client is None:
                address, token = self.address, self.address.secret or ""
                if address.user:
                    token = f"{address.user}:{token}"
                given = {"server_pem_path": address.options["ca"]} if "ca" in address.options else {}
                # A dedicated one: another index that closes its own must not close this.
                self._client = MilvusClient(
                    self._where(), token=token, db_name=self._database, timeout=self._patience, dedicated=True, **given
                )
            return self._client


def server_of(address: MilvusAddress) -> str:
    """Where the server of an address listens, as the client takes it."""
    host, port = address.hosts[0] if address.hosts else ("localhost", None)
    tls = address.options.get("tls", "0") not in ("0", "")
    return f"{'https' if tls else 'http'}://{host}:{port or 19530}"


def raise_as_ours(address: Address, error: Exception) -> NoReturn:
    """Raise what the client raised as one of our errors; a TransientError where another try may help."""
    # A connection that fails has its reason in the error before it only.
    told = [_said(one) for one in dict.fromkeys((error, error.__cause__)) if one is not None]
    said = address.clean("; ".join(dict.fromkeys(told)))
    message, code = said.lower(), getattr(error, "code", None)
    if any(mark in message for mark in DENIED):
        raise AccessError(f"{address}: {said}; name the user in the URL and set {SECRET} or {SECRET}_FILE") from error
    if code == 100 or "collection not found" in message or "can't find collection" in message:
        raise NoIndexError(f"{address}: what the index holds is gone ({said}); build it again") from error
    if any(mark in message for mark in FULL_UP):
        raise StorageError(f"{address}: the server refused ({said}); what was acknowledged is there") from error
    if "database" in message and "not found" in message:
        raise InputError(f"{address}: {said}; create the database, or name another in the URL") from error
    if isinstance(error, grpc.RpcError) or code == CONNECT_FAILED or any(mark in message for mark in NOT_NOW):
        raise TransientError(said) from error
    if any(mark in message for mark in ("field", "schema", "dimension", "data type", "datatype")):
        raise FormatError(f"{address} is not a collection that Matryo made, or was changed: {said}") from error
    raise StorageError(f"{address}: the server refused ({said}); what was acknowledged is there") from error


def _said(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError) and hasattr(error, "details"):
        return f"{error.code().name}: {error.details()}"
    return str(getattr(error, "message", "") or error)


class Embedded:
    """Milvus Lite serving one file in this process, as long as an index of ours is open on it."""

    running: ClassVar[dict[Path, "Embedded"]] = {}
    guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, file: Path, address: Address) -> None:
        try:
            from milvus_lite import exceptions
            from milvus_lite.adapter.grpc.server import start_server_in_thread
        except ImportError as error:
            raise MissingExtraError("milvus-lite", "milvus", "an index in a file of Milvus Lite") from error
        self.file, self.users, self.writing = file, 0, threading.RLock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.server, self.data, self.port = start_server_in_thread(str(file))
        except exceptions.DataDirLockedError as error:
            raise LockedError(
                f"{address} is open elsewhere, and Milvus Lite allows one process at a time, readers too; close it"
            ) from error
        except (exceptions.WALCorruptedError, exceptions.ManifestCorruptedError) as error:
            raise DamagedError(f"{address} cannot be opened by Milvus Lite ({address.clean(error)})") from error
        except OSError as error:
            raise StorageError(f"{address}: {address.clean(error)}") from error

    @classmethod
    def on(cls, file: Path, address: Address) -> "Embedded":
        """The one on this file, started if it does not run yet."""
        with cls.guard:
            found = cls.running.get(file)
            if found is None:
                found = cls.running[file] = cls(file, address)
            found.users += 1
            return found

    def leave(self) -> None:
        """One user fewer; the last one ends it, and other processes may open the file."""
        with self.guard:
            self.users -= 1
            if self.users == 0:
                del self.running[self.file]
                self.server.stop(grace=None).wait()
                self.data.close()


def read_milvus(path: str | Path, allowed: dict[str, str]) -> MilvusAddress:
    """The parts of a URL whose last part names the index.

    Raises:
        InputError: as `read_address`, or the name is missing or cannot be one.
    """
    found = read_address(path, allowed=allowed, secret=SECRET)
    place, _, name = found.path.rpartition("/")
    address = MilvusAddress(found.scheme, found.hosts, place, name, found.options, found.user, found.secret)
    if not NAME.fullmatch(name):
        raise InputError(
            f"{address}: the last part names the index and must be letters, digits and _ (at most 48), got {name!r}: "
            "milvus://host:19530/docs, or milvus://host:19530/database/docs"
        )
    return address


def _patience(address: Address) -> float:
    said = address.options.get("timeout", str(PATIENCE))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{address}: timeout must be seconds above 0, got {said!r}")
    return seconds


def _level(address: Address) -> str:
    said = address.options.get("consistency", "strong")
    if said not in CONSISTENCY:
        raise InputError(f"{address}: consistency must be one of {', '.join(CONSISTENCY)}, got {said!r}")
    return CONSISTENCY[said]
