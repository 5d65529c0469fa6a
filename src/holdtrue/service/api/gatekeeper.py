"""Whoever asks for anything under /v1 is known first, and within their rate: no route can forget it."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import structlog
from anyio import to_thread
from sqlalchemy.exc import DBAPIError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from holdtrue.service import auth, clock
from holdtrue.service.api.context import Parts
from holdtrue.service.api.errors import ApiError, no_valid_key
from holdtrue.service.quotas import Rate

NOTE_SECONDS = 0.1
"""How long the note of a key's use waits for other writers."""
_HOW = "Send it in the header as 'Authorization: Bearer YOUR_KEY'; `holdtrue keys create` makes one"
log = structlog.get_logger("holdtrue.api")


class Gatekeeper:
    """ASGI middleware: authentication and rate limits, before routing and before any body is read."""

    def __init__(self, app: ASGIApp, parts: Parts) -> None:
        self.app = app
        self.parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"] == "/v1" or scope["path"].startswith("/v1/")):
            await to_thread.run_sync(self._admit, scope)
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        admit(self.parts, scope["state"], self._identify(Headers(scope=scope).get("authorization", "")))

    def _identify(self, header: str) -> auth.Found:
        kind, _, secret = header.partition(" ")
        secret = secret.strip()
        if kind.lower() != "bearer" or not secret:
            raise no_valid_key(f"You didn't provide an API key. {_HOW}", None)
        with self.parts.db.read() as session:
            found = auth.find(session, secret, clock.now())
        if found is None:
            raise no_valid_key(f"Incorrect API key provided: unknown, expired or revoked. {_HOW}")
        return found


def admit(parts: Parts, state: MutableMapping[str, Any], found: auth.Found) -> None:
    """Note in a request's state who asks, and count the request.

    Raises:
        ApiError: the project has no requests left in this minute.
    """
    state["principal"] = found.principal
    state["limits"] = parts.settings.limits.with_overrides(found.limits)
    structlog.contextvars.bind_contextvars(key_id=found.principal.key_id)
    if found.stale:
        _note_use(parts, found.principal.key_id)
    project = found.principal.project_id
    rate = parts.rates.hit(project, state["limits"].requests_per_minute)
    state["headers"] = {
        "openai-organization": found.principal.organization_id,
        "openai-project": project,
        **_rate_headers(rate),
    }
    if not rate.allowed:
        wait = max(1, math.ceil(rate.reset_seconds))
        raise ApiError(
            429,
            f"Rate limit reached: {rate.limit} requests a minute for this project. Try again in {wait} s",
            type="requests",
            code="rate_limit_exceeded",
            headers={"retry-after": str(wait)},
        )


def _note_use(parts: Parts, key_id: str) -> None:
    """Note when a key was used, or leave it to a later request: no read waits for a backup or fails for a full disk."""
    try:
        with parts.db.write(wait=NOTE_SECONDS) as session:
            auth.note_use(session, key_id, clock.now())
    except DBAPIError as error:
        log.warning("use of key not noted", error=type(error).__name__)


def _rate_headers(rate: Rate) -> dict[str, str]:
    return {
        "x-ratelimit-limit-requests": str(rate.limit),
        "x-ratelimit-remaining-requests": str(rate.remaining),
        "x-ratelimit-reset-requests": f"{rate.reset_seconds:.3f}s",
    }
