"""The same POST sent again does nothing twice: its first answer is given again, from the transaction that did the work.

Two ways to say that a request is the same. ``Idempotency-Key`` names it, for a day. A client of OpenAI's that sends a
request again by itself names nothing, but says how often it has tried: with a count above zero, an equal request of the
same key within a quarter of an hour is taken for the one before. Unless its first attempt was refused before anything
was done: then the one before is another, which merely says the same, and a mark tells the two apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import structlog
from anyio import to_thread
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdtrue.service import clock
from holdtrue.service.api.context import Caller, Parts, hold_project, parts_of
from holdtrue.service.api.errors import invalid, translate
from holdtrue.service.store.schema import IdempotentRequest

NAMED_SECONDS = 86_400
RETRY_SECONDS = 900
_COUNT = "x-stainless-retry-count"
_DONE = "idempotent_done"
log = structlog.get_logger("holdtrue.api")


class Refusals:
    """ASGI middleware that marks first attempts which came to nothing and which their client makes again."""

    def __init__(self, app: ASGIApp, parts: Parts) -> None:
        self.app = app
        self.parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _tries(Headers(scope=scope)) != 0:
            await self.app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_made_again(message["status"]):
                await to_thread.run_sync(self._mark, scope)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if _is_made_again(translate(error).status):
                await to_thread.run_sync(self._mark, scope)
            raise

    def _mark(self, scope: Scope) -> None:
        if scope["state"].get(_DONE):
            return  # its work was done, and its answer is kept
        try:
            self.parts.rates.set_mark(_mark_name(scope), RETRY_SECONDS)
        except Exception as error:
            log.warning("refusal not marked", error=type(error).__name__)


def _mark_name(scope: Scope) -> str:
    return "refused:" + _hash([Headers(scope=scope).get("authorization", ""), scope["path"]])


def _is_made_again(status: int) -> bool:
    """Whether OpenAI's client sends a request again by itself after such an answer."""
    return status in (408, 409, 429) or status >= 500


def _tries(headers: Headers) -> int | None:
    """Return how often a client says that it has tried before; ``None`` where it does not say."""
    count = headers.get(_COUNT, "")
    return int(count) if count.isascii() and count.isdigit() and len(count) < 10 else None


def once(
    session: Session, request: Request, caller: Caller, payload: Any, do: Callable[[], BaseModel], status: int = 200
) -> Response:
    """Do a thing and keep its answer, or give the answer that is kept; the caller's project is locked before either.

    Args:
        session: the transaction in which ``do`` does all of its work.
        payload: JSON values that make the request what it is; equal ones are the same request.
        do: does the work; what it raises is not kept.
        status: of the answer.

    Raises:
        ApiError: a key that stands for another request, or is no key; an API key that works no longer.
    """
    hold_project(session, caller)
    what = _hash([request.method, request.url.path, payload])
    claimed = _claim(session, request, caller, what)
    if claimed is not None and claimed.status_code is not None and claimed.body is not None:
        headers = {"idempotent-replayed": "true"}
        return Response(claimed.body, claimed.status_code, headers, media_type="application/json")
    body = do().model_dump_json()
    request.scope["state"][_DONE] = True
    if claimed is not None:
        claimed.status_code, claimed.body = status, body
    return Response(body, status, media_type="application/json")


def _claim(session: Session, request: Request, caller: Caller, what: str) -> IdempotentRequest | None:
    named = request.headers.get("idempotency-key")
    if named is not None:
        if not 1 <= len(named) <= 255 or not named.isascii() or not named.isprintable():
            raise invalid("Idempotency-Key must be 1 to 255 printable ASCII characters", "Idempotency-Key")
        row = _row(session, caller, "key:" + _hash(named), what, NAMED_SECONDS, replay=True)
        if row.request_digest != what:
            raise invalid(
                "This Idempotency-Key was used for another request; use a new key for each",
                "Idempotency-Key",
                "idempotency_key_reused",
            )
        return row
    tries = _tries(request.headers)
    if tries is None:
        return None
    mark = parts_of(request).rates.mark(_mark_name(request.scope))
    key = "auto:" + _hash([caller.principal.key_id, what, *([mark] if mark else [])])
    return _row(session, caller, key, what, RETRY_SECONDS, replay=tries > 0)


def _row(session: Session, caller: Caller, key: str, what: str, seconds: int, *, replay: bool) -> IdempotentRequest:
    """Return the row under lock: with an answer to give again, or empty for the answer to come.

    Who does the same request elsewhere has the project locked until the answer is kept.
    """
    now = clock.now()
    row = session.get(IdempotentRequest, (caller.project_id, key), with_for_update=True)
    if row is None:
        row = IdempotentRequest(project_id=caller.project_id, key=key, request_digest=what, created_at=now)
        session.add(row)
        return row
    if not replay or row.created_at <= now - seconds:
        row.request_digest, row.status_code, row.body, row.created_at = what, None, None, now
    return row


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
