"""Logs and traces of the API process: request ids and kinds, and nothing that a customer wrote."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import FastAPI

from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_ASKED = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_ADDRESSES = {"http.url", "http.target", "url.full", "url.path", "url.query"}
"""Where a span has the address, by the old names and the new."""


def set_up_logs() -> None:
    """Write logs to stderr: a line of JSON each, or for people where a terminal reads them."""
    people = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # Both escape line breaks and control characters: no value can look like another line.
            structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING, force=True)


class _Libraries(logging.Handler):
    """What libraries warn of: which one, where, and its text before any value was put into it."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        where = f"{record.filename}:{record.lineno}"
        getattr(structlog.get_logger(record.name), level)(
            "library", template=str(record.msg)[:200], at=where, error=kind
        )


def tracing_asked() -> bool:
    """Whether OpenTelemetry's own variables ask for traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return any(os.environ.get(name, "") not in ("", "none") for name in _ASKED)


def instrument(app: FastAPI) -> None:
    """Trace requests where the environment asks for it, with the exporter that it names.

    Raises:
        SpecError: the exporter is not installed.
    """
    if not tracing_asked():
        return
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "holdtrue-api")
    provider = TracerProvider()
    for name in os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        found = list(entry_points(group="opentelemetry_traces_exporter", name=name.strip()))
        if not found:
            raise SpecError(
                f"OTEL_TRACES_EXPORTER={name.strip()!r} is not installed; "
                "`pip install opentelemetry-exporter-otlp` has 'otlp'"
            )
        provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=provider, excluded_urls="healthz,readyz,metrics", server_request_hook=_redact
    )


def _redact(span: Span, scope: dict[str, Any]) -> None:
    """Take out of a span what a customer wrote into the address: filters in the query, names of models in the path."""
    if not span.is_recording():
        return
    written = getattr(span, "attributes", None) or {}
    route = str(written.get("http.route", "/"))
    for name in _ADDRESSES & written.keys():
        span.set_attribute(name, "" if name == "url.query" else route)
