"""The inference process: the port over HTTP, for those on this machine who know the secret."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from holdtrue.errors import SpecError
from holdtrue.serving.adapters import Fetch
from holdtrue.serving.loopback import is_loopback
from holdtrue.serving.port import ChatError, Event, Inference
from holdtrue.serving.streaming import LiveResponse
from holdtrue.serving.wire import event_to_json, request_from_json

BEAT = 5.0
"""Seconds of silence after which an empty line is sent: it shows that this side lives, and whether the other does."""
_GRACE = 20


class ServerSettings(Protocol):
    """What the process needs to know of a service's settings."""

    @property
    def inference_url(self) -> str: ...
    @property
    def inference_secret(self) -> SecretStr: ...
    @property
    def inference_engine(self) -> Literal["transformers", "vllm"]: ...
    @property
    def threads(self) -> int: ...


def run(settings: ServerSettings, fetch: Fetch, place: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: of the service.
        fetch: gets an adapter's folder from its location.
        place: where the files of adapters may lie; by default where the system has temporary ones.

    Raises:
        SpecError: no secret, or an address that others can reach.
    """
    import uvicorn

    where = urlsplit(settings.inference_url)
    host = where.hostname or ""
    if where.scheme != "http" or not is_loopback(host) or not where.port:
        raise SpecError(
            f"inference_url {settings.inference_url!r} must be http://127.0.0.1:PORT: prompts cross it in clear, so "
            "the inference process runs on the machine of the API"
        )
    secret = settings.inference_secret.get_secret_value()
    if not secret:
        raise SpecError("set HOLDTRUE_INFERENCE_SECRET to the same random text here and for the API")
    engine = make_engine(settings, fetch, place)
    try:
        config = uvicorn.Config(
            create_app(engine, secret),
            host=host,
            port=where.port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE,
        )
        uvicorn.Server(config).run()
    finally:
        engine.close()


def make_engine(settings: ServerSettings, fetch: Fetch, place: Path | None = None) -> Any:
    """Return the engine that the settings name."""
    if settings.inference_engine == "vllm":
        from holdtrue.serving.vllm_engine import VllmEngine

        return VllmEngine(fetch, place)
    from holdtrue.serving.engine import TransformersEngine

    return TransformersEngine(fetch, threads=settings.threads, place=place)


def create_app(engine: Inference, secret: str) -> Starlette:
    """Return the application: ``POST /chat`` streams an answer's events, a line of JSON each; ``GET /healthz``."""
    expected = f"Bearer {secret}".encode()

    async def chat(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode()
        if not secret or not hmac.compare_digest(given, expected):
            return JSONResponse({"error": "not allowed"}, 401)
        lines = _lines(engine, await request.json())
        return LiveResponse(lines, "application/x-ndjson")

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/chat", chat, methods=["POST"]), Route("/healthz", healthz)])


async def _lines(engine: Inference, body: Any) -> AsyncGenerator[str, None]:
    """Yield an answer's lines. When the other side goes away this is closed, and the engine told."""
    try:
        async with engine.chat(request_from_json(body)) as events, contextlib.aclosing(_with_beats(events)) as beaten:
            async for event in beaten:
                yield "\n" if event is None else json.dumps(event_to_json(event)) + "\n"
        yield '"end"\n'
    except ChatError as error:
        yield json.dumps(event_to_json(error)) + "\n"


async def _with_beats(events: AsyncIterator[Event]) -> AsyncGenerator[Event | None, None]:
    waiting: asyncio.Task[Event] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
            done, _ = await asyncio.wait({waiting}, timeout=BEAT)
            if not done:
                yield None
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await waiting  # or the events would be closed while they are read
