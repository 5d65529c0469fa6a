"""Signing in with an API key, and out again; and the files that pages use."""

from __future__ import annotations

import secrets
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from sqlalchemy import select
from starlette.responses import Response

from holdtrue.service import audit, auth, clock
from holdtrue.service.api.context import Parts, PartsDep
from holdtrue.service.api.errors import ApiError
from holdtrue.service.store.schema import ApiKey
from holdtrue.service.web import sessions
from holdtrue.service.web.pages import ASSETS, HEADERS, content, redirect, render
from holdtrue.service.web.sessions import Opened
from holdtrue.service.web.visitor import (
    Sent,
    Signed,
    check_token,
    cookie_name,
    field,
    find,
    read_form,
    safe_path,
)

open_router = APIRouter()
"""What is there without a session."""
router = APIRouter()
_WRONG = "This key is unknown, expired or revoked."
Next = Annotated[str, Query(max_length=400)]


@open_router.get("/")
def start() -> Response:
    """Go where most want to go."""
    return redirect("/jobs")


@open_router.get("/static/{name}")
def static(name: str) -> Response:
    """Return one of the files that pages use."""
    if name not in ASSETS:
        raise ApiError(404, "Invalid URL: there is nothing at this path", code="unknown_url")
    kept = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(content(name), media_type=ASSETS[name], headers={**HEADERS, **kept})


@open_router.get("/sign-in")
def sign_in(request: Request, parts: PartsDep, next: Next = "") -> Response:
    """Show the form."""
    if find(parts, request) is not None:
        return redirect(safe_path(next) or "/jobs")
    return _form(request, parts, next)


def _form(request: Request, parts: Parts, back: str, wrong: str = "", status: int = 200) -> Response:
    # Bound to a cookie that other sites can neither read nor send: nobody signs a browser in as somebody else.
    name = cookie_name(parts.settings, "visit")
    visit = request.cookies.get(name) or secrets.token_urlsafe(32)
    token = sessions.sign_in_token(visit)
    page = render(request, "sign-in.html.j2", status, token=token, back=safe_path(back), wrong=wrong)
    _set(page, parts, "visit", visit, 3600)
    return page


def _set(response: Response, parts: Parts, name: str, value: str, seconds: int) -> None:
    response.set_cookie(
        cookie_name(parts.settings, name),
        value,
        max_age=seconds,
        path="/",
        secure=parts.settings.behind_tls,
        httponly=True,
        samesite="strict",
    )


@open_router.post("/sign-in")
async def do_sign_in(request: Request, parts: PartsDep) -> Response:
    """Open a session for a key."""
    form = await read_form(request)
    visit = request.cookies.get(cookie_name(parts.settings, "visit"), "")
    check_token(form, sessions.sign_in_token(visit) if visit else secrets.token_hex(32))
    opened = await to_thread.run_sync(_open, parts, field(form, "key"), request)
    if opened is None:
        return _form(request, parts, field(form, "next"), _WRONG, 403)
    response = redirect(safe_path(field(form, "next")) or "/jobs")
    _set(response, parts, "session", opened.cookie, opened.expires_at - clock.now())
    _set(response, parts, "visit", "", 0)
    return response


def _open(parts: Parts, secret: str, request: Request) -> Opened | None:
    now = clock.now()
    with parts.db.read() as session:
        found = auth.find(session, secret, now)
    if found is None:
        return None
    with parts.db.write() as session:
        key = session.scalars(select(ApiKey).where(ApiKey.id == found.principal.key_id)).one()
        # A session of before ends: whoever knows its cookie must not be signed in as somebody else.
        sessions.end(session, request.cookies.get(cookie_name(parts.settings, "session"), ""))
        opened = sessions.start(session, key, now)
        auth.note_use(session, key.id, now)
        audit.add(session, key.id, "web.sign_in", key.id, now=now)
        return opened


@router.post("/sign-out")
def sign_out(request: Request, parts: PartsDep, form: Sent, visitor: Signed) -> Response:
    """End the session."""
    with parts.db.write() as session:
        sessions.end(session, request.cookies.get(cookie_name(parts.settings, "session"), ""))
        audit.add(session, visitor.principal.key_id, "web.sign_out", visitor.principal.key_id, now=clock.now())
    response = redirect("/sign-in?said=signed-out")
    _set(response, parts, "session", "", 0)
    return response
