"""The outermost layer: request ids, headers, one log line and one measurement a request, and the last catch."""

from __future__ import annotations

import re
import time
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdtrue.service import ids
from holdtrue.service.api.errors import Answer, ApiError, translate
from holdtrue.service.api.metrics import Metrics
from holdtrue.service.api.telemetry import places

OPENAI_VERSION = "2020-10-01"
"""The version that OpenAI's answers name; clients read it and do nothing with it."""
JSON_BYTES = 4 * 2**20
"""Largest body that is not an upload."""
_DRAIN_BYTES = 64 * 2**20
_DRAIN_SECONDS = 10.0
_UPLOAD = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
_ID = re.compile(r"[a-z]{3,8}-[A-Za-z0-9]{24}")
log = structlog.get_logger("holdtrue.api")


class CutShortError(Exception):
    """An answer broke off; the log says why."""


class Edge:
    """ASGI middleware around everything, error handling included."""

    def __init__(self, app: ASGIApp, metrics: Metrics, upload_bytes: int, answer: Answer) -> None:
        self.app = app
        self.metrics = metrics
        self.answer = answer
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._limit(scope))
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=exchange.id)
        self.metrics.in_flight.inc()
        failure: Exception | None = None
        try:
            try:
                exchange.check_length()
                await self.app(scope, exchange.receive, exchange.send)
            except Exception as error:
                failure = error
                if isinstance(error, ClientDisconnect):
                    pass  # nobody is left to answer
                elif exchange.status is None:
                    await self.answer(scope, translate(error))(scope, receive, exchange.send)
                else:
                    # Half an answer is out: the connection has to break, or it would look whole. Those outside, traces
                    # among them, get nothing of the error's text.
                    raise CutShortError from None
            if exchange.status is not None and exchange.status >= 400:
                await exchange.drain()
        finally:
            self.metrics.in_flight.dec()
            self._note(scope, exchange, failure)

    def _limit(self, scope: Scope) -> int:
        # By the path and not by the content's type: any other route would read the body into memory.
        return self.upload_bytes + 2**20 if _UPLOAD.fullmatch(scope["path"]) else JSON_BYTES

    def _note(self, scope: Scope, exchange: _Exchange, failure: Exception | None) -> None:
        seconds = time.perf_counter() - exchange.began
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        status = exchange.status or 499
        self.metrics.observe(scope["method"], route, status, seconds)
        principal = scope.get("state", {}).get("principal")
        values: dict[str, Any] = {
            "method": scope["method"],
            "route": route,  # not the path: that may carry what a customer wrote
            "status": status,
            "ms": round(seconds * 1000, 1),
            **{name: value for name, value in scope.get("path_params", {}).items() if _ID.fullmatch(str(value))},
            "key_id": principal.key_id if principal else None,
            "project_id": principal.project_id if principal else None,
        }
        if status >= 500 or (failure is not None and not isinstance(failure, ApiError | ClientDisconnect)):
            # The kind and the place of an exception, and not its text, which may quote what a customer sent.
            log.error(
                "request_failed", **values, error=type(failure).__name__, at=places(failure, 4) if failure else []
            )
        else:
            log.info("request", **values)


class _Exchange:
    """One request with its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self.id = ids.new("req")
        self.began = time.perf_counter()
        self.status: int | None = None
        self._scope, self._receive, self._send = scope, receive, send
        self._limit, self._read, self._more = limit, 0, True
        scope.setdefault("state", {})["request_id"] = self.id

    def check_length(self) -> None:
        """Refuse at once what says itself that it is too long."""
        length = Headers(scope=self._scope).get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self._limit:
            raise self._too_long()

    def _too_long(self) -> ApiError:
        return ApiError(413, f"The request is larger than the {self._limit} bytes allowed here", code="too_large")

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._more = message.get("more_body", False)
            if self._read > self._limit:
                raise self._too_long()
        else:
            self._more = False
        return message

    async def drain(self) -> None:
        """Read the rest of a refused body, up to a point: clients read an answer only after they have sent all."""
        end, left = time.monotonic() + _DRAIN_SECONDS, _DRAIN_BYTES
        while self._more and left > 0 and time.monotonic() < end:
            message = await self._receive()
            self._more = message["type"] == "http.request" and message.get("more_body", False)
            left -= len(message.get("body", b""))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            headers["openai-version"] = OPENAI_VERSION
            headers["openai-processing-ms"] = str(round((time.perf_counter() - self.began) * 1000))
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
            for name, value in self._scope["state"].get("headers", {}).items():
                headers.setdefault(name, value)
            if self.status == 429:
                headers.setdefault("retry-after", "1")
        await self._send(message)
