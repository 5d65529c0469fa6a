"""Who asks for a page: a signed-in browser, and for a form one that was sent from a page of ours."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import parse_qs, quote, urlsplit

from anyio import to_thread
from fastapi import Depends, Request

from holdtrue.service import clock
from holdtrue.service.api.context import Parts, parts_of
from holdtrue.service.api.errors import ApiError
from holdtrue.service.api.gatekeeper import admit
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.web import sessions
from holdtrue.service.web.pages import SignInNeededError
from holdtrue.service.web.sessions import Visitor

FORM_BYTES = 64 * 2**10
_FIELDS = 100
_BACK = re.compile(r"/(?!/)[A-Za-z0-9/_-]{0,200}(\?[A-Za-z0-9_=&-]{0,200})?")

Form = dict[str, list[str]]


def cookie_name(settings: ServiceSettings, name: str) -> str:
    """Return a cookie's name; behind TLS its prefix makes browsers insist on TLS and on this very host."""
    return f"__Host-holdtrue-{name}" if settings.behind_tls else f"holdtrue-{name}"


def safe_path(text: str) -> str:
    """Return a path of this service to go back to, or none for anything else."""
    return text if _BACK.fullmatch(text) else ""


async def read_form(request: Request) -> Form:
    """Return the fields of a form.

    Raises:
        ApiError: another site sent it, it is no form, or it is too long.
    """
    if not _own(request):
        raise ApiError(403, "This form was sent from another site. Open the page here and send it again", code="origin")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise ApiError(400, "This is no form", code="form")
    pieces, count = [], 0
    async for piece in request.stream():
        count += len(piece)
        if count > FORM_BYTES:
            raise ApiError(413, f"A form may have {FORM_BYTES} bytes", code="too_large")
        pieces.append(piece)
    try:
        form = parse_qs(b"".join(pieces).decode("utf-8"), keep_blank_values=True, max_num_fields=_FIELDS)
    except ValueError:
        raise ApiError(400, "This is no form", code="form") from None
    if any("\0" in text for name, values in form.items() for text in (name, *values)):
        raise ApiError(400, "A field holds a NUL character, which no browser lets anybody type", code="form")
    return form


def _own(request: Request) -> bool:
    """Whether a browser says that one of our pages sent this; a client that says nothing has the token to show."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def field(form: Form, name: str) -> str:
    """Return a field, empty where it is not there."""
    return form.get(name, [""])[0].strip()


def check_token(form: Form, token: str) -> None:
    """Refuse a form without the token of the page that it stands on (403)."""
    if not sessions.same(field(form, "csrf"), token):
        raise ApiError(
            403, "This form is not from your session, or is from an earlier one. Open the page again", code="csrf"
        )


async def enter(request: Request) -> None:
    """A dependency of every page but the sign-in: note who asks, count it, and check a form's token."""
    parts = parts_of(request)
    visitor = await to_thread.run_sync(_admit, parts, request)
    if request.method not in ("GET", "HEAD"):
        form = await read_form(request)
        check_token(form, visitor.csrf)
        request.state.form = form


def _admit(parts: Parts, request: Request) -> Visitor:
    visitor = find(parts, request)
    if visitor is None:
        back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        raise SignInNeededError(quote(safe_path(back), safe="/") if request.method == "GET" else "")
    request.state.visitor = visitor
    admit(parts, request.scope["state"], visitor.found)
    return visitor


def find(parts: Parts, request: Request) -> Visitor | None:
    """Return who a request's cookie stands for."""
    cookie = request.cookies.get(cookie_name(parts.settings, "session"), "")
    with parts.db.read() as session:
        return sessions.find(session, cookie, clock.now())


def _visitor(request: Request) -> Visitor:
    return request.state.visitor


def _form(request: Request) -> Form:
    return request.state.form


Signed = Annotated[Visitor, Depends(_visitor)]
Sent = Annotated[Form, Depends(_form)]
