"""The errors a user can meet. Each says what it got, what is allowed and how to fix it, in one line."""


class MatryoError(Exception):
    """Base of every error that is the user's to fix (exit status 2 on the command line)."""


class InputError(MatryoError, ValueError):
    """An argument, a file's content or a vector that Matryo refuses."""


class FormatError(MatryoError):
    """A folder or file of ours, written in a format version this release does not read."""


class DamagedError(MatryoError):
    """A file whose size or digest differs from what was recorded when it was written."""


class LockedError(MatryoError):
    """Another process is writing to the same folder."""


class StorageError(MatryoError, OSError):
    """The disk refused (full, read-only, gone). What was acknowledged before is still there."""


class MissingExtraError(MatryoError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed; add it with: pip install 'matryo[{extra}]'")
        self.package = package
        self.extra = extra
