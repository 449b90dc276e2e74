"""What a client is told when it does not get its answer: OpenAI's error shape, all four keys, whatever went wrong."""

from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""`error.type` of each status this server ever sends."""

REPEATABLE = (408, 429, 503)
"""Statuses after which the same request may succeed; of every other one the client is told not to retry."""


class ApiError(Exception):
    """A refusal that is sent as it is. The message never repeats what the client wrote: it may end in a log."""

    def __init__(
        self, status: int, message: str, *, code: str | None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = KINDS[self.status]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What the official clients read: whether to try again, and when."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status not in REPEATABLE:
            found["x-should-retry"] = "false"
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the body is not read
            found["connection"] = "close"
        return found


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, code=code or "invalid_value", param=param)


def internal(number: str, param: str | None = None) -> ApiError:
    """A 500: nothing about the cause but the id under which the log has it."""
    return ApiError(
        500, f"The server failed on this request; the log has it as {number}.", code="internal_error", param=param
    )
