"""The application: one list of routes over one service."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from matryo.serving import about, items
from matryo.serving.door import Endpoint, refusal
from matryo.serving.embeddings import embeddings
from matryo.serving.engines import choose
from matryo.serving.errors import ApiError, internal
from matryo.serving.files import page
from matryo.serving.machine import threads_for
from matryo.serving.openapi import openapi
from matryo.serving.search import Searcher, search
from matryo.serving.service import Service
from matryo.serving.settings import Settings
from matryo.serving.tracing import tracing

log = logging.getLogger("matryo.serving")


def open_service(settings: Settings) -> Service:
    """The model, the index and the keys that the settings name, opened and checked against each other."""
    threads = settings.threads or threads_for(settings.workers)
    choice = choose(settings.model, settings.backend, threads)
    log.info("backend", extra={"fields": {"backend": choice.engine.name, "because": choice.reason, "threads": threads}})
    searcher = Searcher(settings.index, choice, settings.writable) if settings.index else None
    return Service(settings, choice, searcher)


def routes(service: Service) -> list[Route]:
    """Every path of the server. Health is open to all; anything that tells of the model or its load needs a key."""
    return [
        Route("/v1/embeddings", Endpoint(service, "embeddings", embeddings, reads=True, work=True), methods=["POST"]),
        *(_writing(service) if service.settings.writable else ()),
        Route("/v1/search", Endpoint(service, "search", search, reads=True, work=True), methods=["POST"]),
        Route("/v1/models", Endpoint(service, "models", about.models), methods=["GET"]),
        Route("/v1/models/{model:path}", Endpoint(service, "model", about.model), methods=["GET"]),
        Route("/v1/index", Endpoint(service, "index", about.index), methods=["GET"]),
        Route("/", Endpoint(service, "page", page, scope=None), methods=["GET"]),
        Route("/page/{name}", Endpoint(service, "page", page, scope=None), methods=["GET"]),
        Route("/health", Endpoint(service, "health", about.health, scope=None), methods=["GET"]),
        Route("/ready", Endpoint(service, "ready", about.ready, scope=None), methods=["GET"]),
        Route("/openapi.json", Endpoint(service, "openapi", openapi), methods=["GET"]),
        Route("/metrics", Endpoint(service, "metrics", about.metrics), methods=["GET"]),
    ]


def _writing(service: Service) -> list[Route]:
    """Paths that change the index."""
    found = {"/v1/items": ("items", items.upsert), "/v1/items/delete": ("delete", items.delete)}
    return [
        Route(path, Endpoint(service, name, handler, scope="write", reads=True, work=True), methods=["POST"])
        for path, (name, handler) in found.items()
    ]


def create_app(service: Service, signals: bool = False) -> Starlette:
    """The ASGI application of a service, which it starts and closes with its own lifespan.

    Args:
        signals: whether a signal to stop is to finish what was accepted first; for a process of one's own.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        if signals:
            from matryo.serving.server import drain_on_signals

            drain_on_signals(service)
        try:
            yield
        finally:
            await service.close()

    origins = list(service.settings.cors)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
    )
    app = Starlette(
        routes=routes(service),
        middleware=[*([tracing()] if service.settings.traces else []), *([cors] if origins else [])],
        exception_handlers={HTTPException: _http_error, Exception: _bug},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not this method: the contract's shape for those too."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        found = ApiError(405, "This path does not take that method.", code="method_not_allowed")
    else:
        found = ApiError(404, "No such path here; the API is under /v1.", code="not_found")
    more = dict(getattr(error, "headers", None) or {})
    answer = refusal(found)
    return Response(answer.body, answer.status, {**answer.headers, **more}, answer.media)


async def _bug(request: Request, error: Exception) -> Response:
    answer = refusal(internal("unnumbered"))
    return Response(answer.body, answer.status, answer.headers, answer.media)
