"""The queue of adapters that wait for a person, and the person's word."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session, defer
from starlette.responses import Response

from holdtrue.service import audit, clock, ids
from holdtrue.service.api import schemas
from holdtrue.service.api.context import PartsDep, Provider
from holdtrue.service.api.errors import ApiError, not_found
from holdtrue.service.evidence import signing
from holdtrue.service.jobs import publish
from holdtrue.service.store.schema import GateDecision, Job, Organization, Policy, Project
from holdtrue.service.web.findings import verdict
from holdtrue.service.web.pages import redirect, render
from holdtrue.service.web.visitor import Sent, field

router = APIRouter()
MOST = 200
_RECENT = 20


class Word(schemas.Request):
    """A person's decision, with who and why."""

    by: Annotated[schemas.Plain, Field(min_length=1, max_length=100)]
    reason: Annotated[str, Field(min_length=10, max_length=2000)]


@router.get("/gate")
def queue(request: Request, parts: PartsDep, caller: Provider) -> Response:
    """List what waits, the oldest first, and what people decided last."""
    with parts.db.read() as session:
        rows = select(GateDecision, Job, Organization.name).options(defer(GateDecision.report, raiseload=True))
        rows = rows.join(Job, Job.id == GateDecision.job_id).join(Organization, Organization.id == Job.organization_id)
        open_ones = rows.where(GateDecision.override.is_(None), GateDecision.step_number == 0)
        waiting = open_ones.where(GateDecision.action == "hold", Job.held).order_by(GateDecision.created_at)
        blocked = open_ones.where(GateDecision.action == "block").order_by(GateDecision.created_at.desc())
        decided = rows.where(GateDecision.override_at.is_not(None)).order_by(GateDecision.override_at.desc())
        return render(
            request,
            "gate.html.j2",
            waiting=session.execute(waiting.limit(MOST)).all(),
            blocked=session.execute(blocked.limit(_RECENT)).all(),
            decided=session.execute(decided.limit(_RECENT)).all(),
        )


@router.get("/gate/{decision_id}")
def show_decision(decision_id: str, request: Request, parts: PartsDep, caller: Provider) -> Response:
    """Show what the gate found, and ask."""
    with parts.db.read() as session:
        return render(request, "decision.html.j2", **_values(session, decision_id), wrong={}, given={})


def _values(session: Session, decision_id: str) -> dict[str, Any]:
    row = session.get(GateDecision, decision_id) if ids.is_id("gate", decision_id) else None
    if row is None:
        raise not_found("gate decision", decision_id, param="decision_id")
    job = session.scalars(select(Job).where(Job.id == row.job_id)).one()
    return {
        "verdict": verdict(row),
        "open": publish.is_open(row),
        "job": job,
        "policy": session.get_one(Policy, job.policy_id),
        "project": session.get_one(Project, job.project_id),
        "organization": session.get_one(Organization, job.organization_id),
    }


@router.post("/gate/{decision_id}")
def decide(decision_id: str, request: Request, form: Sent, parts: PartsDep, caller: Provider) -> Response:
    """Release or block, under a name and with a reason."""
    word = field(form, "decision")
    given = {name: field(form, name) for name in Word.model_fields}
    wrong: dict[str, str] = {}
    if word not in ("release", "block"):
        wrong["decision"] = "Choose one of the two buttons."
    try:
        said = Word.model_validate(given)
    except ValidationError as error:
        said = None
        asked = {"by": "Give your name (at most 100 characters).", "reason": "Give a reason, 10 to 2000 characters."}
        wrong |= {str(each["loc"][0]): asked[str(each["loc"][0])] for each in error.errors()}
    if wrong or said is None:
        with parts.db.read() as session:
            return render(request, "decision.html.j2", 400, **_values(session, decision_id), wrong=wrong, given=given)
    signer = signing.signer_of(parts.settings)
    try:
        with parts.db.write() as session:
            _values(session, decision_id)
            release = word == "release"
            publish.decide(session, decision_id, release=release, by=said.by, reason=said.reason, signer=signer)
            # The name is what was typed; the key is who it was.
            detail = {"by": said.by, "decision": word}
            audit.add(session, caller.principal.key_id, "gate.decide", decision_id, now=clock.now(), detail=detail)
    except publish.DecisionError as error:
        raise ApiError(409, str(error), code="decided") from None
    return redirect(f"/gate?said={'released' if word == 'release' else 'blocked'}")
