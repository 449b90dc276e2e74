"""Running the application: sockets, workers, signals, and connections that send or read nothing."""

import asyncio
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from matryo.core.errors import InputError
from matryo.serving.app import create_app, open_service
from matryo.serving.door import refusal
from matryo.serving.errors import ApiError
from matryo.serving.logs import log_to
from matryo.serving.service import Service
from matryo.serving.settings import Settings

HANDED_ON = "MATRYO_SERVE"
"""Environment variable that hands the settings to worker processes."""
SWITCH_SECONDS = 0.0005
"""How long a thread may keep Python to itself while another waits: the event loop waits for searches otherwise."""
HEADER_SECONDS = 15.0
STALLED_SECONDS = 20.0

log = logging.getLogger("matryo.serving")


def serve(settings: Settings) -> None:
    """Serve until a signal says to stop. Everything wrong with the settings or the model is said before the port opens.

    Raises:
        InputError: and the other errors of `matryo.load`, of the keys, of the index; or the port cannot be had.
    """
    log_to()
    sys.setswitchinterval(SWITCH_SECONDS)
    if settings.workers == 1:
        server = uvicorn.Server(_config(settings, create_app(open_service(settings), signals=True)))
        opened = _bound(settings)
        _say_where(opened)
        server.run(sockets=[opened])
        return
    tried = open_service(settings)  # what is wrong with the settings is the user's to read, not a dead worker's
    if tried.searcher is not None:
        tried.searcher.close()
    del tried
    os.environ[HANDED_ON] = settings.to_json()
    counters = tempfile.mkdtemp(prefix="matryo-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = counters
    try:
        opened = _bound(settings)
        _say_where(opened)
        Workers(_config(settings, "matryo.serving.server:worker"), sockets=[opened]).run()
    finally:
        shutil.rmtree(counters, ignore_errors=True)


def worker() -> Starlette:
    """The application of one worker process, from the settings its parent left in the environment."""
    log_to()
    sys.setswitchinterval(SWITCH_SECONDS)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    return create_app(open_service(Settings.from_json(os.environ[HANDED_ON])), signals=True)


def _stop_with_parent() -> None:
    """Stop when the parent is gone, even killed: nobody else would, and the port would stay taken."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


class Workers(Multiprocess):
    """Worker processes that are replaced as soon as they die.

    The parent asks each now and then whether it lives, and waits up to the health check's time for an answer. As it
    holds the worker's end of that pipe too, it would wait all of it for one that was killed before it answered: when
    that end is the worker's alone, it is closed with the worker.
    """

    def init_processes(self) -> None:
        super().init_processes()
        self._leave_their_ends()

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        self._leave_their_ends()

    def _leave_their_ends(self) -> None:
        for process in self.processes:
            process.child_conn.close()  # harmless twice


def _config(settings: Settings, app: Starlette | str) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        factory=isinstance(app, str),
        workers=settings.workers,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
        timeout_worker_healthcheck=60,
    )


def _bound(settings: Settings) -> socket.socket:
    """The socket all workers accept from."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        opened = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another --port or --host"
        ) from error
    opened.set_inheritable(True)
    return opened


def _say_where(opened: socket.socket) -> None:
    host, port = opened.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("listening", extra={"fields": {"url": f"http://{shown}:{port}", "process": os.getpid()}})


def drain_on_signals(service: Service) -> None:
    """Let a signal to stop finish what was accepted first: new requests get a 503 until the last answer is sent.

    Call inside the event loop, after the server has installed its own handlers; theirs run once all is answered.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    theirs: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    tasks: list[asyncio.Task[None]] = []

    async def drain(number: int) -> None:
        service.draining = True
        log.info("draining", extra={"fields": {"in_flight": service.in_flight}})
        with suppress(TimeoutError):
            async with asyncio.timeout(service.settings.drain):
                while service.in_flight:
                    await asyncio.sleep(0.01)
        server = getattr(theirs[number], "__self__", None)
        if isinstance(server, uvicorn.Server):
            server.should_exit = True  # and not its handler, which would end the process by the signal

    def stop(number: int, frame: object) -> None:
        if service.draining and callable(theirs[number]):
            theirs[number](number, frame)  # asked twice: now
        else:
            loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(drain(number))))

    for number in theirs:
        signal.signal(number, stop)


class Connection(HttpToolsProtocol):
    """A connection that is cut when its request's head, or its reading of the answer, takes too long.

    A body that takes too long is the door's to refuse.
    """

    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._settle()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self._stall or self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        super().connection_lost(exc)
        if self._stall is not None:
            self._stall.cancel()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets the contract's shape too."""
        answer = refusal(ApiError(400, msg, code="invalid_http"))
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: {answer.media}\r\ncontent-length: {len(answer.body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + answer.body)
        self.transport.close()

    def _expect_head(self) -> None:
        self._head = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _settle(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None
