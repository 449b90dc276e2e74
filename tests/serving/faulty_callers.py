"""Callers for the tests of faults: raw HTTP over loopback, requests that are wrong, load at a set pace."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

SHAPE = {"message", "type", "param", "code"}
PATH = "/v1/embeddings"
TYPED = ("host: localhost", "content-type: application/json")


def http(body: bytes, path: str = PATH, method: str = "POST", head: tuple[str, ...] = TYPED, length: int | None = None):
    """One request as it goes over the wire."""
    size = len(body) if length is None else length
    return "\r\n".join([f"{method} {path} HTTP/1.1", *head, f"content-length: {size}", "", ""]).encode() + body


def embed(texts, **more) -> bytes:
    return http(json.dumps({"model": "words", "input": texts, **more}).encode())


@dataclass
class Answered:
    """What one request came to."""

    status: int
    """0 where the connection ended before any answer began, -1 where it ended in the middle of one."""
    seconds: float
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Wire:
    """One connection, opened again whenever the server has closed it."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.host, self.port, self.streams = host, int(port), None

    async def ask(self, request: bytes) -> Answered:
        """Send and read."""
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port, limit=1 << 24)
        reader, writer = self.streams
        began = time.perf_counter()
        try:
            writer.write(request)
            head = b""
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")[:-2]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.close()
            return Answered(-1 if head or getattr(error, "partial", b"") else 0, time.perf_counter() - began)
        took = time.perf_counter() - began
        if headers.get("connection") == "close":
            self.close()
        return Answered(int(first.split()[1]), took, headers, body)

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def in_turns(url: str, requests, clients: int) -> list[Answered]:
    """So many callers, each with one request at a time; answers in the order of the requests."""
    todo, found = iter(enumerate(requests)), []

    async def call() -> None:
        wire = Wire(url)
        found.extend([(n, await wire.ask(one)) for n, one in todo])
        wire.close()

    await asyncio.gather(*(call() for _ in range(clients)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


async def at_pace(url: str, request, per_second: float, seconds: float) -> list[Answered]:
    """Requests at their times whether or not earlier ones are answered. `request(n)` makes the nth."""
    found: list[Answered] = []
    free: list[Wire] = []

    async def call(n: int) -> None:
        wire = free.pop() if free else Wire(url)
        found.append(await wire.ask(request(n)))
        free.append(wire)

    began, tasks = time.perf_counter(), []
    for n in range(round(per_second * seconds)):
        await asyncio.sleep(max(0.0, began + n / per_second - time.perf_counter()))
        tasks.append(asyncio.ensure_future(call(n)))
    await asyncio.gather(*tasks)
    for wire in free:
        wire.close()
    return found


GOOD = {"model": "words", "input": "mail"}
NOT_INTEGERS = (0, -1, 49, 10**30, True, 8.0, "8", [8], {}, 1e300)
NOT_TEXTS = (
    None,
    7,
    True,
    {},
    "",
    "   ",
    [],
    [""],
    ["mail", ""],
    ["mail", 5],
    [[]],
    [1, 2],
    [[1, 2]],
    [["mail"]],
    [None],
)
WRONG_FIELDS = {
    "model": (None, "other", 5, [], {"a": 1}, ""),
    "input": NOT_TEXTS,
    "dimensions": NOT_INTEGERS,
    "truncate_dim": NOT_INTEGERS,
    "encoding_format": ("hex", 5, []),
    "output_dtype": ("int4", 5, {}),
    "input_type": ("poem", 5),
    "truncate": ("start", True),
    "user": (5, ["a"]),
    "depth": (1, "full"),
}
NOT_JSON = (
    b'{"model": "words", "input": "mail", "dimensions": NaN}',
    b'{"model": "words", "input": "mail", "dimensions": -Infinity}',
    b'{"model": "words", "input": "mail", "dimensions": 1e999}',
    b'{"model": "words", "input": "\\ud800"}',
    b'{"model": "words", "input": "\xff\xfe"}',
    b'{"model": "words", "input": "mail"} and more',
    b"[" * 5000,
    b"",
)
NOT_OBJECTS = (b"[]", b'"text"', b"5", b"null", b"true")


def malformed(draw: random.Random) -> bytes:
    """A request that is wrong in one way, drawn."""
    return draw.choice((_field, _field, _field, _unknown, _torn, _noise, _envelope))(draw)


def _field(draw: random.Random) -> bytes:
    name = draw.choice(list(WRONG_FIELDS))
    return http(json.dumps(GOOD | {name: draw.choice(WRONG_FIELDS[name])}).encode())


def _unknown(draw: random.Random) -> bytes:
    name = "x" + "".join(draw.choices("abcé\n\"'<\\ud83d", k=draw.randint(1, 60)))
    wrong = (GOOD | {name: 1}, {"model": "words"}, {"input": "mail"}, GOOD | {"dimensions": 8, "truncate_dim": 9})
    many = GOOD | {"input": ["mail"] * 2049}
    return http(json.dumps(draw.choice((*wrong, many))).encode())


def _torn(draw: random.Random) -> bytes:
    whole = json.dumps(GOOD | {"input": "mail " * draw.randint(1, 50)}).encode()
    return http(whole[: draw.randrange(len(whole))])


def _noise(draw: random.Random) -> bytes:
    noise = b"\x80" + draw.randbytes(draw.randint(0, 300))  # no JSON begins so
    return http(draw.choice((noise, noise, *NOT_JSON, *NOT_OBJECTS)))


def _envelope(draw: random.Random) -> bytes:
    body, host = json.dumps(GOOD).encode(), "host: localhost"
    chunked = f"POST {PATH} HTTP/1.1\r\n{host}\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    return draw.choice(
        (
            http(body, head=(host,)),
            http(body, head=(host, "content-type: text/plain")),
            http(body, head=(*TYPED, "content-encoding: gzip")),
            http(body, head=("host: evil.example", TYPED[1])),
            http(body, path=f"/v1/{draw.choice(('', 'embeddings/', 'completions', '..%2f..', '%00', 'models/none'))}"),
            http(body, method=draw.choice(("PUT", "DELETE", "PATCH"))),
            http(b"", method="GET"),
            http(b"", length=5 << 20),
            chunked.encode() + b"ZZ\r\n",
            b"\x16\x03\x01" + draw.randbytes(60) + b"\r\n\r\n",
            b"POST /v1/embeddings\r\n\r\n",
            b"POST / HTTP/1.1\r\nno colon here\r\n\r\n",
        )
    )
