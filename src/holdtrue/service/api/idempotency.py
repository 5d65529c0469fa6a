"""The same POST sent again does nothing twice: its first answer is given again, from the transaction that did the work.

Two ways to say that a request is the same. ``Idempotency-Key`` names it, for a day. A client of OpenAI's that sends a
request again by itself names nothing, but says how often it has tried: with a count above zero, an equal request of the
same key within a quarter of an hour is taken for the one before. Unless a first attempt at it was refused since, before
anything was done: then the one before is another, which merely says the same. A mark has the time of the refusal; where
marks are lost, what was asked for may not be done, and nothing is done twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import anyio
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
_BODY_SECONDS = 1.0
"""How long a refusal waits for the rest of the body, to know what was refused."""
_COUNT = "x-stainless-retry-count"
_DONE = "idempotent_done"
_SENT = "idempotent_sent"
log = structlog.get_logger("holdtrue.api")


class Refusals:
    """ASGI middleware that marks first attempts which came to nothing and which their client makes again."""

    def __init__(self, app: ASGIApp, parts: Parts) -> None:
        self.app = app
        self.parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tries = _tries(Headers(scope=scope)) if scope["type"] == "http" and scope["method"] == "POST" else None
        if tries is None:
            await self.app(scope, receive, send)
            return
        sent = scope["state"][_SENT] = _Sent(scope, receive)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_made_again(
                message["status"], Headers(raw=message["headers"])
            ):
                await self._mark(scope, sent)
            await send(message)

        try:
            await self.app(scope, sent.receive, watched if tries == 0 else send)
        except Exception as error:
            told = translate(error)
            if tries == 0 and _is_made_again(told.status, told.headers):
                await self._mark(scope, sent)
            raise

    async def _mark(self, scope: Scope, sent: _Sent) -> None:
        await sent.finish()
        # Of work that was done nobody knows whether it was kept. If so, its answer is as new as the mark.
        at = scope["state"].get(_DONE) or clock.microseconds()
        try:
            await to_thread.run_sync(self.parts.rates.set_mark, sent.names()[0], RETRY_SECONDS, at)
        except Exception as error:
            log.warning("refusal not marked", error=type(error).__name__)


class _Sent:
    """What tells a request from others before it is understood: who sends it where, how long it is, and its body.

    The body of a form is another each time, by its boundary, and may be large: there the length has to do.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        self._about = [headers.get("authorization", ""), scope["path"], headers.get("content-length", "")]
        self._form = headers.get("content-type", "").lower().startswith("multipart/")
        self._receive = receive
        self._digest = hashlib.sha256()
        self._whole = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not self._form:
            self._digest.update(message.get("body", b""))
            self._whole = not message.get("more_body", False)
        return message

    async def finish(self) -> None:
        """Read the rest of a body that nobody is going to read, if it comes soon."""
        try:
            with anyio.move_on_after(_BODY_SECONDS):
                while not self._form and not self._whole:
                    if (await self.receive())["type"] != "http.request":
                        return
        except Exception as error:  # too long, for one
            log.info("body of a refusal not read", error=type(error).__name__)

    def names(self) -> list[str]:
        """Return the names of its mark, the most exact first; one that was refused may have had the last alone."""
        exact = [[*self._about, self._digest.hexdigest()]] if self._whole else []
        return ["refused:" + _hash(name) for name in (*exact, self._about)]


def _is_made_again(status: int, headers: Mapping[str, str]) -> bool:
    """Whether OpenAI's client sends a request again by itself after such an answer."""
    return (status in (408, 409, 429) or status >= 500) and headers.get("x-should-retry") != "false"


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
    request.scope["state"][_DONE] = done_at = clock.microseconds()
    if claimed is not None:
        claimed.status_code, claimed.body, claimed.done_at = status, body, done_at
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
    key = "auto:" + _hash([caller.principal.key_id, what])
    if tries == 0:
        return _row(session, caller, key, what, RETRY_SECONDS, replay=False)
    rates, sent = parts_of(request).rates, request.scope["state"][_SENT]
    refused_at = max(map(rates.mark, sent.names()))
    return _row(session, caller, key, what, RETRY_SECONDS, replay=True, since=refused_at)


def _row(
    session: Session, caller: Caller, key: str, what: str, seconds: int, *, replay: bool, since: int = 0
) -> IdempotentRequest:
    """Return the row under lock: with an answer of ``since`` or later to give again, or empty for the answer to come.

    Who does the same request elsewhere has the project locked until the answer is kept.
    """
    now = clock.now()
    row = session.get(IdempotentRequest, (caller.project_id, key), with_for_update=True)
    if row is None:
        row = IdempotentRequest(project_id=caller.project_id, key=key, request_digest=what, created_at=now)
        session.add(row)
        return row
    if not replay or row.created_at <= now - seconds or row.done_at < since:
        row.request_digest, row.status_code, row.body, row.created_at = what, None, None, now
    return row


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
