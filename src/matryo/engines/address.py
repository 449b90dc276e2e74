"""Where an engine is, and what lets us in. Secrets come from the environment or a file and are never printed."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from matryo.core.errors import InputError
from matryo.index.index import FROM_ENVIRONMENT

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,47}")
"""What a table may be called."""


@dataclass(frozen=True)
class Address:
    """One index in an engine.

    postgresql://user@host1:5432,host2:5433/database?table=docs&sslmode=verify-full
    postgresql+shards://user@host1:5432,%2Frun%2Fpg2/database?table=docs
    qdrant://host:6334/docs           qdrant+edge:///folder/docs
    milvus://host:19530/docs          milvus+lite:///folder/file.db/docs
    """

    scheme: str
    hosts: tuple[tuple[str, int | None], ...]
    path: str
    """Database."""
    name: str
    """Table."""
    options: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    secret: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The URL without its secret, which opens the same index."""
        hosts = ",".join(_said(host) + ("" if port is None else f":{port}") for host, port in self.hosts)
        user = f"{quote(self.user)}@" if self.user else ""
        options = {**self.options, "table": self.name}
        query = "&".join(f"{name}={quote(value, safe='/:,')}" for name, value in options.items())
        return f"{self.scheme}://{user}{hosts}/{self.path}?{query}"

    def clean(self, text: object) -> str:
        """One line of an engine's message, the secret cut out of it."""
        lines = [line.strip() for line in str(text).splitlines() if line.strip()]
        line = "; ".join(lines) or type(text).__name__
        return line.replace(self.secret, "***") if self.secret else line


def read_address(url: str | Path, *, allowed: Mapping[str, str], secret: str) -> Address:
    """The parts of a URL.

    Args:
        url: the URL, or env:NAME for one in an environment variable; only that one may hold a password.
        allowed: query option -> what it is, for the error that names them.
        secret: environment variable of the password or key; its name with _FILE appended may name a file instead.

    Raises:
        InputError: not a URL of this kind, an unknown option, a name the engine could not hold, or a password in it.
    """
    text = str(url)
    from_environment = text.startswith(FROM_ENVIRONMENT)
    if from_environment:
        text = os.environ.get(text.removeprefix(FROM_ENVIRONMENT), "")
    parts = urlsplit(text)
    shown = text if parts.password is None else text.replace(parts.password, "***")
    if parts.password is not None and not from_environment:
        raise InputError(
            f"{shown} holds a password, which shells and logs remember; set {secret} or {secret}_FILE, or put the "
            "whole URL into an environment variable and give env:NAME"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for option in options:
        if option not in allowed:
            known = ", ".join(f"{name} ({what})" for name, what in allowed.items())
            raise InputError(f"{shown}: unknown option {option!r}; allowed: {known or 'none'}")
    name = options.pop("table", "matryo")
    if not NAME.fullmatch(name):
        raise InputError(
            f"{shown}: the option table names the index and must be letters, digits and _ (at most 48), got {name!r}"
        )
    user = unquote(parts.username) if parts.username else None
    found = unquote(parts.password) if parts.password else read_secret(secret)
    hosts = _hosts(parts.netloc.rpartition("@")[2], shown)
    return Address(parts.scheme, hosts, unquote(parts.path).lstrip("/"), name, options, user, found)


def read_secret(name: str) -> str | None:
    """The value of an environment variable, or of the file that `NAME_FILE` names; None where neither is set."""
    if os.environ.get(name):
        return os.environ[name]
    place = os.environ.get(f"{name}_FILE")
    if not place:
        return None
    try:
        return Path(place).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}_FILE names {place}, which cannot be read ({type(error).__name__})") from error


def _hosts(text: str, shown: str) -> tuple[tuple[str, int | None], ...]:
    found: list[tuple[str, int | None]] = []
    for part in filter(None, text.split(",")):
        host, colon, port = part.rpartition(":") if not part.endswith("]") else (part, "", "")
        if not colon:
            host, port = part, ""
        if port and not (port.isdecimal() and 0 < int(port) < 1 << 16):
            raise InputError(f"{shown}: port {port!r} is not a number from 1 to 65535")
        found.append((unquote(host).removeprefix("[").removesuffix("]"), int(port) if port else None))
    return tuple(found)


def _said(host: str) -> str:
    """A host as a URL holds it: an IPv6 address in brackets, the slashes of a socket's folder encoded."""
    return f"[{host}]" if ":" in host else quote(host, safe="")
