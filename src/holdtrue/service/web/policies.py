"""The provider's policies: versions, which one is in force, what differs, and putting one in force."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from holdtrue.errors import HoldtrueError
from holdtrue.service import clock, ids
from holdtrue.service.api.context import PartsDep, Provider
from holdtrue.service.api.errors import ApiError, not_found
from holdtrue.service.policy import store as policies
from holdtrue.service.store.schema import ActivePolicy, Policy
from holdtrue.service.web.pages import redirect, render
from holdtrue.service.web.visitor import Sent, field

router = APIRouter()
PolicyId = Annotated[str, Query(max_length=64)]


def _policy(session: Session, policy_id: str) -> Policy:
    row = session.get(Policy, policy_id) if ids.is_id("policy", policy_id) else None
    if row is None:
        raise not_found("policy", policy_id, param="policy_id")
    return row


@router.get("/policies")
def list_policies(request: Request, parts: PartsDep, caller: Provider) -> Response:
    """List all versions, by base model."""
    with parts.db.read() as session:
        bases = session.scalars(select(Policy.base_model).distinct().order_by(Policy.base_model)).all()
        active = {row.base_model: row for row in session.scalars(select(ActivePolicy))}
        versions = {base: policies.history(session, base) for base in bases}
        return render(request, "policies.html.j2", versions=versions, active=active)


@router.get("/policies/compare")
def compare(request: Request, parts: PartsDep, caller: Provider, old: PolicyId = "", new: PolicyId = "") -> Response:
    """Show what differs between two versions."""
    with parts.db.read() as session:
        one, two = _policy(session, old), _policy(session, new)
        change, wrong = _change(one, two)
        return render(request, "compare.html.j2", old=one, new=two, change=change, wrong=wrong)


def _change(old: Policy, new: Policy) -> tuple[policies.Change | None, str]:
    """Return the difference, or why it cannot be told: a stored version may be one that no longer reads as written."""
    try:
        return policies.change(old, new), ""
    except HoldtrueError as error:
        return None, str(error)


@router.get("/policies/{policy_id}")
def show_policy(policy_id: str, request: Request, parts: PartsDep, caller: Provider) -> Response:
    """Show a version, and how it differs from the one in force."""
    with parts.db.read() as session:
        row = _policy(session, policy_id)
        active = policies.active(session, row.base_model)
        change, wrong = _change(active or row, row)
        return render(request, "policy.html.j2", policy=row, active=active, change=change, wrong=wrong)


@router.post("/policies/{policy_id}/activate")
def activate(policy_id: str, form: Sent, parts: PartsDep, caller: Provider) -> Response:
    """Put a version in force, in the place of the one that the person saw."""
    now = clock.now()
    with parts.db.write() as session:
        row = _policy(session, policy_id)
        try:
            policies.document_of(row)
        except HoldtrueError as error:
            raise ApiError(409, str(error), code="policy_unreadable") from None
        before = policies.activate(session, row, actor=caller.principal.key_id, now=now)
        if (before.id if before else "") != field(form, "instead_of"):
            raise ApiError(
                409,
                "Another version is in force than when you opened the page. Look at the difference again",
                code="policy_changed",
            )
    return redirect("/policies?said=activated")
