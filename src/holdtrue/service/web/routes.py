"""All routes of the pages: those behind a session, and the few before it."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from holdtrue.service.web import gate, jobs, keys, live, policies, sign_in
from holdtrue.service.web.visitor import enter


def routers() -> list[APIRouter]:
    """Return the routers. Whoever adds a page adds it to the second: no page there can forget to ask who looks."""
    behind = APIRouter(dependencies=[Depends(enter)])
    for module in (sign_in, jobs, live, policies, gate, keys):
        behind.include_router(module.router)
    return [sign_in.open_router, behind]
