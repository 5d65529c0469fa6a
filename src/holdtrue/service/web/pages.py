"""How a page is made: its template, its headers, and an error that people can read."""

from __future__ import annotations

import datetime
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from holdtrue.service import ids
from holdtrue.service.api.errors import ApiError, respond
from holdtrue.service.web.sessions import Visitor

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
ASSETS = {
    "style.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""The files that pages use; nothing else can be asked for."""
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    # Not no-referrer: with it browsers send `Origin: null` with a form, and the check of a form wants to know.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
    "vary": "Cookie, Accept",
}
SAID = {
    "cancel": "The job was asked to cancel.",
    "pause": "The job was asked to pause.",
    "resume": "The job was asked to go on.",
    "revoked": "The key was revoked. Nothing works with it any more.",
    "activated": "The version is in force. Jobs that have begun keep the version they began with.",
    "released": "The model was released, under your name.",
    "blocked": "The model was blocked, under your name.",
    "signed-out": "You are signed out.",
}
"""What a page says after something was done; the address names one of these, and never carries a text."""
TITLES = {
    400: "This cannot be done",
    401: "Sign in first",
    403: "Not allowed",
    404: "Not found",
    409: "In the meantime something changed",
    413: "Too large",
    429: "Too many requests",
}


class SignInNeededError(ApiError):
    """A page was asked for without a session. ``back`` is where to go afterwards, or empty."""

    def __init__(self, back: str = "") -> None:
        self.back = back
        super().__init__(401, "Sign in first: /sign-in", code="sign_in")


@functools.cache
def environment() -> Environment:
    """Return the report's environment for pages about what strangers wrote, with the filters of these pages."""
    from holdtrue.runs.report import numbers
    from holdtrue.runs.report.page import templates

    made = templates(HERE / "templates")
    made.filters.update(figure=figure, when=when, stamp=stamp, bytes=size, nats=numbers.nats)
    made.globals.update(asset=asset, job_path=job_path)
    return made


@functools.cache
def content(name: str) -> bytes:
    """Return one of the ``ASSETS``."""
    return (HERE / "static" / name).read_bytes()


@functools.cache
def asset(name: str) -> str:
    """Return the address of one of the ``ASSETS``: another content is another address, so that it may be kept."""
    return f"/static/{name}?v={hashlib.sha256(content(name)).hexdigest()[:16]}"


def render(request: Request, template: str, /, status: int = 200, **values: Any) -> Response:
    """Return a page."""
    return _page(request.scope, template, status, values)


def _page(scope: Scope, template: str, status: int, values: dict[str, Any]) -> Response:
    visitor: Visitor | None = scope.get("state", {}).get("visitor")
    said = SAID.get(Request(scope).query_params.get("said", ""), "") if scope["method"] == "GET" else ""
    text = (
        environment()
        .get_template(template)
        .render(visitor=visitor, csrf=visitor.csrf if visitor else "", path=scope["path"], said=said, **values)
    )
    # A text from a file name may hold what is no Unicode.
    return HTMLResponse(text.encode("utf-8", "replace"), status, headers=HEADERS)


def redirect(to: str) -> Response:
    """Return what sends a browser on after a form."""
    return RedirectResponse(to, 303, headers=HEADERS)


def answer(scope: Scope, error: ApiError) -> Response:
    """Return an error as a page to browsers that ask for one, and as OpenAI's JSON to everybody else."""
    path = scope["path"]
    wanted = Headers(scope=scope).get("accept", "")
    if path == "/v1" or path.startswith("/v1/") or "text/html" not in wanted:
        return respond(error)
    if isinstance(error, SignInNeededError):
        return redirect("/sign-in" + (f"?next={error.back}" if error.back else ""))
    values = {
        "title": TITLES.get(error.status, "Something went wrong"),
        "message": error.detail.message,
        "request_id": scope.get("state", {}).get("request_id", ""),
    }
    found = _page(scope, "error.html.j2", error.status, values)
    found.headers.update({name: value for name, value in error.headers.items() if name == "retry-after"})
    return found


def figure(value: Any) -> str:
    """Write a number with four significant digits; a dash for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def when(seconds: int | None) -> str:
    """Write a time for people, in UTC."""
    return "–" if seconds is None else _utc(seconds).strftime("%Y-%m-%d %H:%M:%S UTC")


def stamp(seconds: int) -> str:
    """Write a time for machines."""
    return _utc(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def _utc(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def size(count: int) -> str:
    """Write a number of bytes."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def job_path(job_id: str) -> str:
    """Return the address of a job's page."""
    assert ids.is_id("ftjob", job_id)
    return f"/jobs/{job_id}"
