"""The errors a user can meet. Each says what it got, what is allowed and how to fix it, in one line."""


class MatryoError(Exception):
    """Base of every error that is the user's to fix (exit status 2 on the command line)."""


class InputError(MatryoError, ValueError):
    """An argument, a file's content or a vector that Matryo refuses."""


class NoIndexError(InputError):
    """There is no index at this place."""


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


class RemoteError(MatryoError):
    """A server did not do what it was asked. `status` is None where there was no answer at all."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.request = request
        """The id under which the server's log has it."""


class RefusedError(RemoteError, InputError):
    """A server's 4xx: the request itself is wrong, and `param` says which field."""


class AccessError(RemoteError):
    """A server's 401 or 403: no key, a wrong one, or one that does not allow this."""


class UnavailableError(RemoteError):
    """A server that could not be reached, was too busy, or did not answer in time, however often it was asked."""
