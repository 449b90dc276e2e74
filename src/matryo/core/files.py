"""Writing files so that a name always points at a whole file: temporary file, fsync, rename, fsync the folder."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from matryo.core.errors import StorageError


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError inside into a StorageError that says what was being done; earlier state is untouched."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{what}: {reason}; nothing that was saved before is lost") from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and move the result to `path`. On any failure `path` keeps what it held."""
    # On a disk that machines share, two of them may have processes of one number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with storage_errors(f"writing {path}"):
            write(temporary)
            fsync_file(temporary)
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` into `path`, all or nothing."""
    write_atomically(path, lambda temporary: _write(temporary, text.encode()))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def digest(path: Path) -> str:
    """BLAKE2b-128 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
