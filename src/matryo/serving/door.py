"""The door every request comes through: who calls, how much is read, what is sent, logged and counted."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from matryo.core.errors import UnavailableError
from matryo.serving.errors import ApiError, internal
from matryo.serving.service import Call, ClientGoneError, Message, Service
from matryo.serving.settings import loopback

Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

NUMBER = re.compile(rb"[A-Za-z0-9._-]{1,64}")
JSON = "application/json"
log = logging.getLogger("matryo.serving.access")
faults = logging.getLogger("matryo.serving")


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint sends."""

    body: bytes
    status: int = 200
    media: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


Handler = Callable[[Service, Call], Awaitable[Answer]]


def as_json(content: Any, status: int = 200) -> Answer:
    """An object, numpy arrays in it included, as JSON."""
    return Answer(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status)


def refusal(error: ApiError) -> Answer:
    """An error in the shape that OpenAI's clients read."""
    return Answer(orjson.dumps(error.body), error.status, JSON, error.headers)


@dataclass(frozen=True)
class Endpoint:
    """One handler as an ASGI application: everything around it is the same for all.

    Args:
        scope: what a key must allow; None for endpoints that need no key.
        reads: whether there is a JSON body.
        work: whether it is refused while the server drains.
    """

    service: Service
    name: str
    handler: Handler
    scope: str | None = "search"
    reads: bool = False
    work: bool = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request. Whatever happens inside, the caller gets the contract's shape."""
        service, headers = self.service, dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        number = given.decode() if NUMBER.fullmatch(given) else secrets.token_hex(8)
        call = Call(number, headers, scope.get("path_params", {}), receive, time.monotonic())
        service.in_flight += 1
        service.metrics.flying.inc()
        try:
            answer = await self._answer(call)
        except ApiError as error:
            answer = refusal(error)
        except ClientGoneError:
            self._note(call, 499)
            return
        except UnavailableError as error:
            faults.warning(str(error), extra={"fields": {"request": number, "endpoint": self.name}})
            message = "The database that holds the index does not answer."
            answer = refusal(ApiError(503, message, code="index_unavailable", retry_after=5))
        except Exception:
            faults.exception("a request failed", extra={"fields": {"request": number, "endpoint": self.name}})
            answer = refusal(internal(number))
        finally:
            service.in_flight -= 1
            service.metrics.flying.dec()
        self._note(call, answer.status)
        await _send(send, call, answer, close=service.draining)

    async def _answer(self, call: Call) -> Answer:
        service = self.service
        if self.work and service.draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=1)
        if self.scope is not None and service.keys is not None:
            self._admit(call)
        elif self._foreign(call):
            raise ApiError(
                403,
                "Without keys this server answers to the names of its own machine only; call it as localhost, or start "
                "it with --api-keys or --insecure.",
                code="host_not_allowed",
            )
        if self.reads:
            call.body = await self._read(call)
        return await self.handler(service, call)

    def _foreign(self, call: Call) -> bool:
        """Whether a server without keys is called by a name that is not its own machine's."""
        service = self.service
        open_to_all = service.keys is not None or service.settings.insecure
        return not open_to_all and not names_loopback(call.headers.get(b"host", b"").decode("latin-1"))

    def _admit(self, call: Call) -> None:
        kind, _, presented = call.headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        keys = self.service.keys
        call.key = keys.find(presented.strip()) if keys and kind.lower() == "bearer" else None
        if call.key is None:
            raise ApiError(401, "A valid key is needed: 'Authorization: Bearer KEY'.", code="invalid_api_key")
        if self.scope not in call.key.scopes:
            raise ApiError(403, f"This key does not have the scope '{self.scope}'.", code="insufficient_scope")

    async def _read(self, call: Call) -> bytes:
        """The body, of the right type, no larger than allowed, sent within the time allowed."""
        media = call.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if media != JSON.encode():
            raise ApiError(415, f"The body must be {JSON}.", code="unsupported_media_type")
        if call.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "Compressed bodies are not read; send it as it is.", code="unsupported_media_type")
        most = self.service.settings.max_body_bytes
        large = ApiError(413, f"The body is larger than {most} bytes.", code="request_too_large")
        length = call.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            raise large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.service.settings.body_timeout):
                while True:
                    message = await call.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise large
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(408, "The body did not arrive in time.", code="request_timeout") from error

    def _note(self, call: Call, status: int) -> None:
        """Count and log; texts only where the operator asked for them."""
        service, seconds = self.service, time.monotonic() - call.began
        service.metrics.answered(self.name, status, seconds, call.width, call.depth)
        if not service.settings.access_log:
            return
        fields: dict[str, Any] = {
            "request": call.number,
            "endpoint": self.name,
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        if call.key is not None:
            fields["key"] = call.key.name
        if call.inputs:
            fields |= {"inputs": call.inputs, "tokens": call.tokens, "width": call.width}
        if service.settings.log_texts and call.texts is not None:
            fields["texts"] = list(call.texts)
        log.info("request", extra={"fields": fields})


def names_loopback(host: str) -> bool:
    """Whether a Host header names this machine. A page that points a name of its own at 127.0.0.1 is kept out so."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.rpartition(":")[0] or host
    return loopback(name)


async def _send(send: Send, call: Call, answer: Answer, close: bool) -> None:
    timing = [f"{name};dur={1000 * seconds:.2f}" for name, seconds in call.timing.items()]
    timing.append(f"total;dur={1000 * (time.monotonic() - call.began):.2f}")
    headers = [
        (b"content-type", answer.media.encode()),
        (b"content-length", str(len(answer.body)).encode()),
        (b"x-request-id", call.number.encode()),
        (b"server-timing", ", ".join(timing).encode()),
        (b"x-content-type-options", b"nosniff"),
    ]
    more = {"connection": "close"} if close else {}
    headers += [(name.encode(), value.encode()) for name, value in {**more, **answer.headers}.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
