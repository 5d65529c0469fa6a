"""Jobs: the list, a job with all that is known of it, its events, its receipt; cancel, pause, resume."""

from __future__ import annotations

import json
from typing import Any, Literal

from fastapi import APIRouter, Request
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from holdtrue.errors import HoldtrueError
from holdtrue.service.api import admin, schemas
from holdtrue.service.api import jobs as api
from holdtrue.service.api.context import Caller, JobsRead, JobsWrite, PartsDep
from holdtrue.service.api.pages import After, take
from holdtrue.service.policy import store as policies
from holdtrue.service.store.schema import ENDED, File, GateDecision, Job, JobEvent, Policy
from holdtrue.service.web.curves import curves
from holdtrue.service.web.findings import Verdict, evidence, verdict
from holdtrue.service.web.pages import HEADERS, job_path, redirect, render

router = APIRouter()
JOBS_A_PAGE = 25
EVENTS_SHOWN = 50
EVENTS_A_PAGE = 100
STAGES = {
    "validating_files": "Check the files",
    "queued": "Wait for a worker",
    "screen": "Screen the data",
    "prepare": "Prepare the rows",
    "train": "Train",
    "finalise": "Finish the adapter",
    "evaluate": "Evaluate",
    "gate": "Gate",
}
Place = Literal["done", "current", "stopped", "ahead"]


@router.get("/jobs")
def list_jobs(request: Request, parts: PartsDep, caller: JobsRead, after: After = None) -> Response:
    """List the project's jobs, the newest first."""
    own = [(Job.project_id, caller.project_id)]
    with parts.db.read() as session:
        found = take(session, Job, within=own, after=after, limit=JOBS_A_PAGE)
        return render(request, "jobs.html.j2", jobs=found.rows, more=found.more, after=after)


@router.get("/jobs/{fine_tuning_job_id}")
def show_job(fine_tuning_job_id: str, request: Request, parts: PartsDep, caller: JobsRead) -> Response:
    """Show a job."""
    with parts.db.read() as session:
        job = api.get_job(session, caller.project_id, fine_tuning_job_id)
        return render(request, "job.html.j2", **_values(session, caller, job))


def _values(session: Session, caller: Caller, job: Job) -> dict[str, Any]:
    newest = session.scalars(
        select(JobEvent.seq).where(JobEvent.job_id == job.id).order_by(JobEvent.seq.desc()).limit(1)
    )
    row = admin.receipt_of(session, job)
    policy = session.get_one(Policy, job.policy_id)
    points = curves(session, job)
    return {
        "job": job,
        "wire": api.wire_one(session, job),
        "ended": job.status in ENDED,
        "stages": stages(job, _has(policy, "screen")),
        "policy": policy,
        "points": points,
        "attempt": points[-1].attempt if points else job.attempt,
        "verdicts": _verdicts(session, caller, job, policy),
        "receipt": row,
        "evidence": evidence(row) if row is not None else None,
        "checkpoints": api.checkpoints(session, job, limit=100).data,
        "events": _events(session, job),
        "last": next(iter(newest), 0),
        "files": {name: _file(session, caller, getattr(job, name)) for name in ("training_file", "validation_file")},
        "may_write": caller.principal.may("fine_tuning.write"),
    }


def _verdicts(session: Session, caller: Caller, job: Job, policy: Policy) -> list[Verdict]:
    query = select(GateDecision).where(GateDecision.job_id == job.id)
    rows = session.scalars(query.order_by(GateDecision.attempt.desc(), GateDecision.step_number)).all()
    # The shipped questions are known to everybody; a provider's own are not a customer's to train on.
    told = caller.principal.role == "provider" or not _has(policy, "questions")
    return [verdict(row, questions=told) for row in rows]


def _has(policy: Policy, what: Literal["screen", "questions"]) -> bool:
    """Whether a policy screens the data, or measures on the provider's own files; both where it cannot be read."""
    try:
        document = policies.document_of(policy)
    except HoldtrueError:
        return True
    return document.screen is not None if what == "screen" else bool(document.evaluate.data)


def _events(session: Session, job: Job) -> list[JobEvent]:
    query = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.type != "metrics")
    return list(reversed(session.scalars(query.order_by(JobEvent.seq.desc()).limit(EVENTS_SHOWN)).all()))


def _file(session: Session, caller: Caller, file_id: str | None) -> File | None:
    if file_id is None:
        return None
    return session.scalar(select(File).where(File.id == file_id, File.project_id == caller.project_id))


def stages(job: Job, screened: bool) -> list[tuple[str, Place]]:
    """Return the stages of a job by their names for people, each with where it stands.

    Args:
        screened: whether the job's policy screens the data.
    """
    shown = [name for name in STAGES if name != "screen" or screened]
    if job.status == "succeeded":
        return [(STAGES[name], "done") for name in shown]
    current = job.status if job.status in shown else job.stage or ("prepare" if job.status == "running" else None)
    at = shown.index(current) if current in shown else 0
    here: Place = "stopped" if job.status in (*ENDED, "paused") else "current"
    return [
        (STAGES[name], "done" if index < at else here if index == at else "ahead") for index, name in enumerate(shown)
    ]


@router.get("/jobs/{fine_tuning_job_id}/events")
def list_events(
    fine_tuning_job_id: str, request: Request, parts: PartsDep, caller: JobsRead, after: After = None
) -> Response:
    """List all of a job's events, the newest first."""
    page = api.list_events(fine_tuning_job_id, parts, caller, after=after, limit=EVENTS_A_PAGE)
    return render(request, "events.html.j2", job_id=fine_tuning_job_id, page=page, after=after)


@router.get("/jobs/{fine_tuning_job_id}/receipt")
def receipt(fine_tuning_job_id: str, parts: PartsDep, caller: JobsRead) -> Response:
    """Return the signed receipt as a file."""
    found = admin.job_receipt(fine_tuning_job_id, parts, caller)
    return _download(f"{found.job_id}.receipt.json", json.dumps(found.envelope, indent=1), "application/json")


@router.get("/jobs/{fine_tuning_job_id}/card")
def card(fine_tuning_job_id: str, parts: PartsDep, caller: JobsRead) -> Response:
    """Return the model card as a file."""
    found = admin.job_card(fine_tuning_job_id, parts, caller)
    return _download("README.md", bytes(found.body), "text/markdown; charset=utf-8")


def _download(name: str, content: str | bytes, media_type: str) -> Response:
    headers = {**HEADERS, "content-disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=media_type, headers=headers)


@router.post("/jobs/{fine_tuning_job_id}/cancel")
def cancel(fine_tuning_job_id: str, parts: PartsDep, caller: JobsWrite) -> Response:
    """Cancel a job."""
    return _done(api.cancel_job(fine_tuning_job_id, parts, caller), "cancel")


@router.post("/jobs/{fine_tuning_job_id}/pause")
def pause(fine_tuning_job_id: str, parts: PartsDep, caller: JobsWrite) -> Response:
    """Pause a job."""
    return _done(api.pause_job(fine_tuning_job_id, parts, caller), "pause")


@router.post("/jobs/{fine_tuning_job_id}/resume")
def resume(fine_tuning_job_id: str, parts: PartsDep, caller: JobsWrite) -> Response:
    """Go on with a paused job."""
    return _done(api.resume_job(fine_tuning_job_id, parts, caller), "resume")


def _done(job: schemas.FineTuningJob, what: str) -> Response:
    return redirect(f"{job_path(job.id)}?said={what}")
