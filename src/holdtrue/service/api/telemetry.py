"""Logs and traces of the API process: request ids and kinds, and nothing that a customer wrote."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import MutableMapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import FastAPI

from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_ASKED = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_MOST_FRAMES = 20
_MOST_CAUSES = 5
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
            exception_places,
            # Both escape line breaks and control characters: no value can look like another line.
            structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING, force=True)


def exception_places(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put an exception's type and the places that it passed in the place of itself, for each that led to it as well.

    Neither its text nor any value is told: both may quote what a customer sent, or hold a secret.
    """
    error = _exception(event.pop("exc_info", None))
    event.pop("stack_info", None)
    if error is None:
        return event
    event["error"], event["places"] = type(error).__name__, places(error)
    causes = _causes(error)
    if causes:
        event["causes"] = [{"error": type(each).__name__, "places": places(each)} for each in causes]
    return event


def _exception(told: Any) -> BaseException | None:
    """Return the exception that a logger was told of, in any of the ways in which it can be."""
    if isinstance(told, tuple):
        told = told[1]
    elif told and not isinstance(told, BaseException):
        told = sys.exc_info()[1]
    return told if isinstance(told, BaseException) else None


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while len(found) < _MOST_CAUSES:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            break
        found.append(cause)
        error = cause
    return found


def places(error: BaseException, most: int = _MOST_FRAMES) -> list[str]:
    """Return where an exception came from as ``file:line:function``, the innermost last, and none of its values."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)][-most:]
    return [f"{code.co_filename.rpartition('/')[2]}:{line}:{code.co_name}" for code, line in frames]


class _Libraries(logging.Handler):
    """What libraries warn of: which one, where, and its text before any value was put into it."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        where = f"{record.filename}:{record.lineno}"
        getattr(structlog.get_logger(record.name), level)(
            "library", template=str(record.msg)[:200], at=where, error=None, exc_info=record.exc_info
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
