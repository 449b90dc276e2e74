"""Serving: one model over HTTP, OpenAI's contract with a true width knob. Needs the `serve` extra."""

from typing import TYPE_CHECKING

from matryo.serving.settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["Settings", "create_app", "serve"]

PACKAGES = ("httptools", "orjson", "prometheus_client", "starlette", "uvicorn")


def serve(settings: Settings) -> None:
    """Serve a model until a signal says to stop: see `matryo.serving.server.serve`."""
    _insist()
    from matryo.serving import server

    server.serve(settings)


def create_app(settings: Settings) -> "Starlette":
    """The ASGI application, for a server or a test of one's own. Its lifespan has to be run."""
    _insist()
    from matryo.serving import app

    return app.create_app(app.open_service(settings))


def _insist() -> None:
    from importlib.util import find_spec

    from matryo.core.errors import MissingExtraError

    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingExtraError(package, "serve", "serving over HTTP")
