"""API keys: a file of names, scopes and hashes. A key itself is shown once, when it is made, and stored nowhere.

    {"format": 1, "keys": [{"name": "web", "scopes": ["search"], "sha256": "9f86d0..."}]}

Keys have 256 random bits, so one plain hash is enough: there is nothing to guess from. `search` lets a caller encode
and search, `write` change the index of a server that is `--writable`.
"""

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from matryo.core.errors import DamagedError, FormatError, InputError
from matryo.core.files import write_text

FORMAT = 1
SCOPES = ("search", "write")
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
EXAMPLE = '{"format": 1, "keys": [{"name": "web", "scopes": ["search"], "sha256": "..."}]}'


@dataclass(frozen=True)
class Key:
    """What is known of one key: never the key."""

    name: str
    scopes: frozenset[str]
    sha256: bytes


class Keys:
    """The keys of a server."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys

    def find(self, presented: str) -> Key | None:
        """The key that was presented, or None. Takes as long whichever key it is, and if it is none."""
        digest = hashlib.sha256(presented.encode()).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found


def read_keys(path: Path) -> Keys:
    """The keys of a file.

    Raises:
        InputError: no such file, or one without keys. DamagedError, FormatError: it is not a file of keys.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of keys; make one with: matryo key {path} --name web")
    keys = _read(path)
    if not keys:
        raise InputError(f"{path} holds no keys, so nobody could call; add one with: matryo key {path} --name web")
    return Keys(keys)


def add_key(path: Path, name: str, scopes: tuple[str, ...]) -> str:
    """Make a key, add its hash to the file (made if missing) and return the key, which cannot be had again."""
    if not NAME.fullmatch(name):
        raise InputError(f"a key's name is 1 to 64 letters, digits, '.', '_' or '-', got {name!r}")
    if not scopes or not set(scopes) <= set(SCOPES):
        raise InputError(f"scopes are some of {', '.join(SCOPES)}, got {', '.join(scopes) or 'none'}")
    keys = _read(path) if path.is_file() else []
    if any(key.name == name for key in keys):
        raise InputError(f"{path} has a key named {name!r} already; choose another name or remove that one first")
    made = f"mt-{secrets.token_urlsafe(32)}"
    keys.append(Key(name, frozenset(scopes), hashlib.sha256(made.encode()).digest()))
    rows = [{"name": key.name, "scopes": sorted(key.scopes), "sha256": key.sha256.hex()} for key in keys]
    write_text(path, json.dumps({"format": FORMAT, "keys": rows}, indent=2) + "\n")
    return made


def _read(path: Path) -> list[Key]:
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise FormatError(f"{path} is of format {content['format']!r}; this release reads format {FORMAT}")
        keys = [
            Key(str(one["name"]), frozenset(one["scopes"]), bytes.fromhex(one["sha256"])) for one in content["keys"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise DamagedError(f"{path} is not a file of keys, which looks like {EXAMPLE}") from error
    for key in keys:
        if len(key.sha256) != hashlib.sha256().digest_size or not key.scopes <= set(SCOPES) or not key.scopes:
            raise DamagedError(
                f"{path}: key {key.name!r} needs a sha256 of 64 hexadecimal digits and scopes among {', '.join(SCOPES)}"
            )
    return keys
