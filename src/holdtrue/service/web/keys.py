"""A project's keys: list, make, revoke; and what the project has used."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from sqlalchemy import select
from starlette.responses import Response

from holdtrue.errors import SpecError
from holdtrue.service import auth, clock
from holdtrue.service.api import admin
from holdtrue.service.api.context import Admin, Caller, ModelsRead, Parts, PartsDep
from holdtrue.service.api.errors import ApiError
from holdtrue.service.api.pages import After
from holdtrue.service.store.schema import Project
from holdtrue.service.web.pages import redirect, render
from holdtrue.service.web.visitor import Form, Sent, field

router = APIRouter()
KEYS_A_PAGE = 100
PROJECTS_SHOWN = 200
ENDS = {"": "Never", "2592000": "In 30 days", "7776000": "In 90 days", "31536000": "In a year"}
SCOPES = {
    "files.read": "Read files",
    "files.write": "Upload and delete files",
    "fine_tuning.read": "See jobs",
    "fine_tuning.write": "Create, cancel and pause jobs",
    "models.read": "See models and usage",
    "models.write": "Delete models",
    "chat": "Ask models",
    "admin": "Manage keys",
}


@router.get("/keys")
def list_keys(
    request: Request,
    parts: PartsDep,
    caller: Admin,
    project: Annotated[str, Query(max_length=64, pattern="^[^\0]*$")] = "",
    after: After = None,
) -> Response:
    """List a project's keys, the newest first, with a form for another."""
    return _page(request, parts, caller, project or caller.project_id, after=after)


def _page(
    request: Request,
    parts: Parts,
    caller: Caller,
    project: str,
    status: int = 200,
    *,
    after: str | None = None,
    **more: Any,
) -> Response:
    found = admin.list_keys(parts, caller, project, after, KEYS_A_PAGE)
    provider = caller.principal.role == "provider"
    with parts.db.read() as session:
        query = select(Project).order_by(Project.created_at, Project.id).limit(PROJECTS_SHOWN + 1)
        projects = session.scalars(query).all() if provider else []
    values = {
        "keys": found.data,
        "more": found.has_more,
        "after": after,
        "ended": {key.id for key in found.data if _has_ended(key)},
        "project": project,
        "projects": projects[:PROJECTS_SHOWN],
        "many": len(projects) > PROJECTS_SHOWN,
        "roles": [role for role in auth.ROLES if provider or role != "provider"],
        "scopes": {name: text for name, text in SCOPES.items() if name in caller.principal.scopes},
        "ends": ENDS,
        "own": caller.principal.key_id,
        "wrong": "",
        "given": {},
        "made": None,
    }
    return render(request, "keys.html.j2", status, **{**values, **more})


def _has_ended(key: admin.Key) -> bool:
    now = clock.now()
    return any(end is not None and end <= now for end in (key.revoked_at, key.expires_at))


@router.post("/keys")
def create_key(request: Request, form: Sent, parts: PartsDep, caller: Admin) -> Response:
    """Make a key; this page is the only one that shows it."""
    project = field(form, "project") or caller.project_id
    try:
        made = admin.create_key(_wish(form, project), parts, caller)
    except (ValidationError, SpecError, ApiError) as error:
        if isinstance(error, ApiError) and error.status == 404:
            raise
        wrong = "Give the key a name of at most 200 characters." if isinstance(error, ValidationError) else str(error)
        given = {name: field(form, name) for name in ("name", "role", "ends")} | {"scopes": form.get("scopes", [])}
        return _page(request, parts, caller, project, 400, wrong=wrong, given=given)
    return _page(request, parts, caller, project, made=made)


def _wish(form: Form, project: str) -> admin.KeyCreate:
    ends = field(form, "ends")
    return admin.KeyCreate.model_validate(
        {
            "name": field(form, "name"),
            "role": field(form, "role") or "member",
            "scopes": form.get("scopes", []),
            "expires_in": int(ends) if ends in ENDS and ends else None,
            "project_id": project,
        }
    )


@router.post("/keys/{key_id}/revoke")
def revoke_key(key_id: str, parts: PartsDep, caller: Admin) -> Response:
    """End a key at once."""
    found = admin.revoke_key(key_id, parts, caller)
    return redirect(f"/keys?project={found.project_id}&said=revoked")


@router.get("/usage")
def usage(request: Request, parts: PartsDep, caller: ModelsRead) -> Response:
    """Show what the project has used today, and what it may."""
    return render(request, "usage.html.j2", usage=admin.usage(parts, caller))
