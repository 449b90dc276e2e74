"""A small static model, the application in this process, and real servers as child processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx2
import numpy as np
import pytest
from openai import AsyncOpenAI, OpenAI
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import matryo as mt
from matryo.core.prefix import Nesting
from matryo.encoders import Card
from matryo.encoders.export import export_onnx
from matryo.encoders.folder import fingerprint, write_card
from matryo.serving import Settings, create_app
from matryo.serving.keys import add_key

WORDS = 400
WIDTHS = (8, 16, 32, 48)


@pytest.fixture(scope="session")
def static_model(debian_rows, tmp_path_factory) -> Path:
    """A static model folder: the commonest words of the test texts with random vectors."""
    folder = tmp_path_factory.mktemp("models") / "words"
    folder.mkdir()
    counts: dict[str, int] = {}
    for row in debian_rows:
        for word in (row["anchor"] + " " + row["positive"]).lower().split():
            counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 1]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.random.default_rng(0).standard_normal((WORDS, WIDTHS[-1])).astype(np.float32)
    save_file({"embedding.weight": table}, folder / "model.safetensors")
    kind = "sentence_transformers.models.StaticEmbedding"
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    score = {"task": "tiny", "metric": "nDCG@10", "width": 48, "code": "float32", "value": 0.5, "low": 0.4, "high": 0.6}
    write_card(folder, Card(str(folder), Nesting(WIDTHS), scores=(score,)))
    return folder


@pytest.fixture(scope="session")
def exported(minilm, tmp_path_factory) -> Path:
    """MiniLM for onnxruntime."""
    folder = tmp_path_factory.mktemp("exports") / "minilm"
    found = export_onnx(minilm, folder)
    assert found["difference"] < 1e-5
    return folder


class InProcess:
    """The application in this process, asked by httpx or by the official client."""

    def __init__(self, app) -> None:
        self.app = app
        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost")

    def openai(self, **options) -> AsyncOpenAI:
        return AsyncOpenAI(
            **{"api_key": "none", "base_url": "http://localhost/v1", "http_client": self.http, **options}
        )

    async def post(self, body, path="/v1/embeddings", **more):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | more.pop("headers", {})
        return await self.http.post(path, content=content, headers=headers, **more)


@pytest.fixture(scope="session")
def in_process():
    """`in_process(app)`: a client of an application whose lifespan somebody else runs."""
    return InProcess


@pytest.fixture(scope="session")
def within():
    """`within(app_or_settings, body)`: run an async test body against an application whose lifespan is on."""

    def go(what, body):
        @asynccontextmanager
        async def running():
            app = create_app(what) if isinstance(what, Settings) else what
            async with app.router.lifespan_context(app):
                yield InProcess(app)

        async def main():
            async with asyncio.timeout(60), running() as here:
                return await body(here)

        return asyncio.run(main())

    return go


class Served:
    """A server in a process of its own."""

    def __init__(self, *arguments, port="0", **environment) -> None:
        line = [sys.executable, "-m", "matryo", "serve", *map(str, arguments), "--port", port]
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        self.lines: list[dict] = []
        self.said = ""
        for line in self.process.stderr:
            self.said += line
            with suppress(ValueError):
                self.lines.append(json.loads(line))
                if self.lines[-1]["event"] == "listening":
                    break
        else:
            raise RuntimeError(self.said)
        self.url = self.lines[-1]["url"]
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.said += line
            with suppress(ValueError):
                self.lines.append(json.loads(line))

    def openai(self, **options) -> OpenAI:
        return OpenAI(**{"api_key": "none", "base_url": f"{self.url}/v1", "max_retries": 0, **options})

    def stop(self, number=signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(30)
        self.reader.join()
        self.process.stderr.close()
        return status


@pytest.fixture(scope="session")
def serve():
    """`serve(arguments...)`: a server as a child process; those left running are stopped at the end."""
    started: list[Served] = []

    def go(*arguments, **environment) -> Served:
        started.append(Served(*arguments, **environment))
        return started[-1]

    yield go
    for one in started:
        if one.process.poll() is None:
            one.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def served(serve, static_model) -> Served:
    """One server of the small static model that quick tests share."""
    return serve(static_model, "--alias", "text-embedding-3-small")


@pytest.fixture(scope="session")
def documents(static_model, debian_rows, tmp_path_factory) -> Path:
    """An index of the test texts by the small static model."""
    folder = tmp_path_factory.mktemp("documents") / "docs.matryo"
    model, texts = mt.load(static_model), [row["positive"] for row in debian_rows]
    made_by = {"name": str(static_model)} | fingerprint(str(static_model))
    with mt.Index.create(folder, width=48, plan="16:binary keep 40 > 48:float32", model=made_by) as index:
        metadata = [{"section": ("games", "libs")[n % 2]} for n in range(len(texts))]
        index.upsert([f"d{n}" for n in range(len(texts))], model.encode(texts), texts, metadata)
    return folder


@pytest.fixture(scope="session")
def guarded(serve, static_model, documents, tmp_path_factory) -> tuple[Served, str]:
    """A server with an index that asks for a key, and the key."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    key = add_key(keys, "clients", ("search",))
    return serve(static_model, "--index", documents, "--api-keys", keys), key
