"""OpenTelemetry traces, where the operator asks for them: a span per request, no input text in it."""

from typing import Any

from starlette.middleware import Middleware

from matryo.core.errors import MissingExtraError


def tracing(processor: Any = None) -> Middleware:
    """Middleware that sends spans where OpenTelemetry's own environment variables say (OTEL_EXPORTER_OTLP_ENDPOINT...).

    Args:
        processor: a span processor in the place of the one that sends them; for tests.

    Raises:
        MissingExtraError: the `otel` extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingExtraError("opentelemetry-instrumentation-asgi", "otel", "--traces") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "matryo"}))
    provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
    options: Any = {"tracer_provider": provider, "exclude_spans": ["receive", "send"]}
    return Middleware(OpenTelemetryMiddleware, **options)
