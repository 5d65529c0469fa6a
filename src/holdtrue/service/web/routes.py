"""All routes of the pages: those behind a session, and the few before it."""

from __future__ import annotations

from fastapi import Depends, FastAPI

from holdtrue.service.web import gate, jobs, keys, live, policies, sign_in
from holdtrue.service.web.visitor import enter

BEFORE = (sign_in.open_router,)
BEHIND = tuple(module.router for module in (sign_in, jobs, live, policies, gate, keys))
"""Whoever adds a page adds it to one of these: it cannot forget to ask who looks."""


def install(app: FastAPI) -> None:
    """Add the pages to an application; its OpenAPI document is about the API alone."""
    for router in BEFORE:
        app.include_router(router, include_in_schema=False)
    for router in BEHIND:
        app.include_router(router, include_in_schema=False, dependencies=[Depends(enter)])
