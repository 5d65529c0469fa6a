"""The inference process: an engine behind HTTP on the loopback address, for whoever knows the secret."""

from __future__ import annotations

import hmac
import json
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from holdtrue.errors import HoldtrueError, SpecError
from holdtrue.serving.port import AdapterRef, BusyError, ChatRequest, Engine, RequestError, error_body

SECRET = "x-holdtrue-secret"
log = structlog.get_logger()


class Engines:
    """An engine for each base model, made when it is first asked for."""

    def __init__(self, home: Path, store: Any) -> None:
        self._folder, self._store = home / "adapters", store
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()

    def of(self, base: str) -> Engine:
        """Return the engine of a base model."""
        with self._lock:
            if base not in self._engines:
                from holdtrue.models import load_model, load_tokenizer, resolve
                from holdtrue.serving.engine import TransformersEngine

                source = resolve(base)
                self._engines[base] = TransformersEngine(load_model(source), load_tokenizer(source), self.fetch)
            return self._engines[base]

    def fetch(self, adapter: AdapterRef) -> Path:
        """Return a local folder with an adapter, whose content is what its digest says."""
        from holdtrue.models.digest import tree_digest

        folder = self._folder / adapter.digest
        if folder.is_dir() and tree_digest(folder) == adapter.digest:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._store.fetch_tree(adapter.location, folder, adapter.digest)
        return folder

    def close(self) -> None:
        """Stop all engines."""
        for engine in self._engines.values():
            engine.close()


def create_app(engines: Engines, secret: str) -> FastAPI:
    """Build the application; every route but ``/healthz`` wants the secret."""
    if not secret:
        raise SpecError("the inference process needs a secret: set HOLDTRUE_INFERENCE_SECRET for it and for the API")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        if not hmac.compare_digest(request.headers.get(SECRET, "").encode(), secret.encode()):
            return JSONResponse({"error": "the secret is wrong", "kind": "other"}, 403)
        try:
            asked = ChatRequest.model_validate_json(await request.body())
        except ValidationError as error:
            return JSONResponse(error_body(RequestError(str(error))), 400)
        try:
            stream = await anyio.to_thread.run_sync(lambda: engines.of(asked.base).submit(asked))
        except RequestError as error:
            return JSONResponse(error_body(error), 400)
        except BusyError as error:
            return JSONResponse(error_body(error), 503)
        except HoldtrueError as error:
            log.exception("cannot answer", base=asked.base)
            return JSONResponse(error_body(BusyError(f"{type(error).__name__}: the model cannot be loaded")), 503)
        return StreamingResponse(_lines(stream), media_type="application/x-ndjson")

    return app


async def _lines(stream: Any) -> AsyncIterator[bytes]:
    pieces: Iterator[Any] = iter(stream)
    try:
        while True:
            try:
                piece = await anyio.to_thread.run_sync(next, pieces, None, abandon_on_cancel=True)
            except HoldtrueError as error:
                yield json.dumps(error_body(error)).encode() + b"\n"
                return
            if piece is None:
                return
            yield piece.model_dump_json().encode() + b"\n"
    finally:
        stream.cancel()


def run(home: Path, url: str, secret: str, store: Any, threads: int = 0) -> None:
    """Serve until told to stop.

    Args:
        home: adapters are kept in ``adapters`` below it.
        url: where to listen, such as ``http://127.0.0.1:8001``.
        secret: that clients show.
        store: has ``fetch_tree(key, folder, digest)``.
        threads: of torch; 0 leaves its default.
    """
    import uvicorn

    place = urlsplit(url)
    if threads:
        import torch

        torch.set_num_threads(threads)
    engines = Engines(home, store)
    config = uvicorn.Config(
        create_app(engines, secret),
        host=place.hostname or "127.0.0.1",
        port=place.port or 8001,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=20,
    )
    try:
        uvicorn.Server(config).run()
    finally:
        engines.close()
