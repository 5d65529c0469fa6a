"""/v1/fine_tuning/jobs: create, read, stop and go on; a job's events and checkpoints."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from holdtrue.service import audit, clock, ids, quotas
from holdtrue.service.api import metadata, schemas
from holdtrue.service.api.context import Caller, JobsRead, JobsWrite, PartsDep, hold_project
from holdtrue.service.api.errors import invalid, not_found, responses
from holdtrue.service.api.files import get_file, page
from holdtrue.service.api.idempotency import once
from holdtrue.service.api.models import get_model
from holdtrue.service.api.pages import After, take
from holdtrue.service.jobs import lifecycle
from holdtrue.service.policy import RefusalError, settle
from holdtrue.service.policy import store as policies
from holdtrue.service.store.schema import File, Job, JobCheckpoint, JobEvent, Model

router = APIRouter(tags=["fine-tuning"])


def get_job(session: Session, project_id: str, job_id: str, *, lock: bool = False) -> Job:
    """Return a tenant's job; 404 for another's and for what is no id at all."""
    row = None
    if ids.is_id("ftjob", job_id):
        query = select(Job).where(Job.id == job_id, Job.project_id == project_id)
        row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise not_found("fine-tuning job", job_id, param="fine_tuning_job_id", code="fine_tune_not_found")
    return row


def wire(row: Job, pairs: Mapping[str, str]) -> schemas.FineTuningJob:
    """Return a job as the wire has it."""
    names = ("batch_size", "learning_rate_multiplier", "n_epochs")
    asked, used = row.hyperparameters or {}, row.resolved or {}
    numbers = {name: used.get(name, asked.get(name) or "auto") for name in names}
    wandb = (row.integrations or {}).get("wandb")
    same = ("id", "created_at", "error", "estimated_finish", "fine_tuned_model", "finished_at", "model", "seed")
    more = ("organization_id", "status", "trained_tokens", "training_file", "validation_file")
    return schemas.FineTuningJob.model_validate(
        {
            **{name: getattr(row, name) for name in (*same, *more)},
            "hyperparameters": numbers,
            "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
            "integrations": [{"type": "wandb", "wandb": wandb}] if wandb else None,
            "metadata": dict(pairs) or None,
            "result_files": [row.result_file] if row.result_file else [],
        }
    )


def wire_one(session: Session, row: Job) -> schemas.FineTuningJob:
    """Return a job with its metadata as the wire has it."""
    return wire(row, metadata.of_jobs(session, [row.id])[row.id])


@router.post("/v1/fine_tuning/jobs", response_model=schemas.FineTuningJob, responses=responses(409))
def create_job(body: schemas.JobCreate, request: Request, parts: PartsDep, caller: JobsWrite) -> Response:
    """Create a job. Everything about its training that is not a field here is the provider's policy."""
    prefix, wishes = _wishes(body)

    def do() -> schemas.FineTuningJob:
        return _create(session, caller, body, prefix, wishes)

    with parts.db.write() as session:
        return once(session, request, caller, body.model_dump(mode="json"), do)


def _wishes(body: schemas.JobCreate) -> tuple[str, dict[str, Any]]:
    """Return the hyperparameters, and where in the request they stand."""
    method = body.method
    if method is not None and method.type != "supervised":
        raise invalid(
            f"method.type '{method.type}' is not offered here; use 'supervised' with chat rows",
            "method.type",
            "unsupported_method",
        )
    if method is not None and (method.dpo is not None or method.reinforcement is not None):
        raise invalid("method has settings of another type than 'supervised'", "method", "unsupported_method")
    new = method.supervised.hyperparameters if method is not None and method.supervised is not None else None
    old = body.hyperparameters
    if new is not None and old is not None and new != old:
        raise invalid(
            "hyperparameters are given twice and differ; give them under method.supervised", "hyperparameters"
        )
    chosen = new if new is not None else old
    values = {} if chosen is None else chosen.model_dump(exclude_none=True)
    return ("" if new is None else "method.supervised."), {
        name: values.get(name, "auto") for name in schemas.Hyperparameters.model_fields
    }


def _create(
    session: Session, caller: Caller, body: schemas.JobCreate, prefix: str, wishes: dict[str, Any]
) -> schemas.FineTuningJob:
    """Create a job; the project is locked, so that what is looked up here stays until the job names it."""
    now = clock.now()
    model = get_model(session, caller.project_id, body.model)
    _training_file(session, caller, body.training_file, "training_file")
    if body.validation_file is not None:
        _training_file(session, caller, body.validation_file, "validation_file")
        if body.validation_file == body.training_file:
            raise invalid("validation_file must be another file than training_file", "validation_file")
    policy = policies.active(session, model.base_model)
    if policy is None:
        raise invalid(f"{model.base_model} cannot be tuned: no policy is active for it", "model", "model_not_tunable")
    try:
        settle(policies.document_of(policy), wishes)
    except RefusalError as error:
        raise RefusalError(prefix + error.param, str(error)) from None
    quotas.check_tokens(session, caller.project_id, caller.limits, now=now)
    quotas.check_jobs(session, caller.project_id, caller.limits)
    wandb = body.integrations[0].wandb.model_dump() if body.integrations else None
    job = lifecycle.create(
        session,
        project_id=caller.project_id,
        organization_id=caller.principal.organization_id,
        created_by=caller.principal.key_id,
        model=model.name,
        base_model=model.base_model,
        parent_model_id=None if model.kind == "base" else model.id,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        hyperparameters=wishes,
        integrations=None if wandb is None else {"wandb": wandb},
        policy_id=policy.id,
        metadata=body.metadata or {},
    )
    # A tuned model's name has its owner's suffix in it, and the audit log keeps no customer's texts.
    detail = {"model": model.name if model.kind == "base" else model.id, "policy": policy.id}
    audit.add(session, caller.principal.key_id, "job.create", job.id, now=now, detail=detail)
    return wire_one(session, job)


def _training_file(session: Session, caller: Caller, file_id: str, param: str) -> File:
    row = get_file(session, caller.project_id, file_id, param=param)
    if row.purpose != "fine-tune":
        raise invalid(f"{file_id} was uploaded for '{row.purpose}'; upload it with purpose 'fine-tune'", param)
    if row.bytes == 0:
        raise invalid(f"{file_id} is empty", param)
    return row


@router.get("/v1/fine_tuning/jobs", responses=responses(), openapi_extra=metadata.QUERY)
def list_jobs(
    request: Request,
    parts: PartsDep,
    caller: JobsRead,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> schemas.Page[schemas.FineTuningJob]:
    """List jobs, the newest first."""
    wanted = metadata.read(request.query_params)
    within: list[tuple[Any, Any]] = [
        (Job.project_id, caller.project_id),
        *([(Job.tagged, False)] if wanted.none else []),
    ]
    with parts.db.read() as session:
        if wanted.pairs:
            found = metadata.take(session, caller.project_id, wanted.pairs, after=after, limit=limit)
        else:
            found = take(session, Job, within=within, after=after, limit=limit)
        pairs = metadata.of_jobs(session, [row.id for row in found.rows])
        return page([wire(row, pairs[row.id]) for row in found.rows], found.more)


@router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}", responses=responses())
def retrieve_job(fine_tuning_job_id: str, parts: PartsDep, caller: JobsRead) -> schemas.FineTuningJob:
    """Return what is known of a job."""
    with parts.db.read() as session:
        return wire_one(session, get_job(session, caller.project_id, fine_tuning_job_id))


def _request(job_id: str, wanted: str, action: str, parts: Any, caller: Caller) -> schemas.FineTuningJob:
    with parts.db.write() as session:
        hold_project(session, caller)
        job = get_job(session, caller.project_id, job_id, lock=True)
        try:
            lifecycle.request(session, job, wanted)
        except lifecycle.TransitionError as error:
            raise invalid(str(error), "fine_tuning_job_id", "invalid_state") from None
        audit.add(session, caller.principal.key_id, action, job.id, now=clock.now())
        return wire_one(session, job)


@router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", responses=responses(409))
def cancel_job(fine_tuning_job_id: str, parts: PartsDep, caller: JobsWrite) -> schemas.FineTuningJob:
    """Cancel a job."""
    return _request(fine_tuning_job_id, "cancel", "job.cancel", parts, caller)


@router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", responses=responses(409))
def pause_job(fine_tuning_job_id: str, parts: PartsDep, caller: JobsWrite) -> schemas.FineTuningJob:
    """Pause a job; it keeps what it has learned."""
    return _request(fine_tuning_job_id, "pause", "job.pause", parts, caller)


@router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", responses=responses(409))
def resume_job(fine_tuning_job_id: str, parts: PartsDep, caller: JobsWrite) -> schemas.FineTuningJob:
    """Go on with a paused job."""
    return _request(fine_tuning_job_id, "run", "job.resume", parts, caller)


@router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", responses=responses())
def list_events(
    fine_tuning_job_id: str,
    parts: PartsDep,
    caller: JobsRead,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> schemas.Page[schemas.JobEvent]:
    """List a job's events, the newest first."""
    with parts.db.read() as session:
        job = get_job(session, caller.project_id, fine_tuning_job_id)
        found = take(session, JobEvent, within=[(JobEvent.job_id, job.id)], after=after, limit=limit)
        names = ("id", "created_at", "level", "message", "type")
        items = [
            schemas.JobEvent.model_validate({**{name: getattr(row, name) for name in names}, "data": finite(row.data)})
            for row in found.rows
        ]
        return page(items, found.more)


def finite(value: Any) -> Any:
    """Return JSON values with ``None`` for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


@router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", responses=responses())
def list_checkpoints(
    fine_tuning_job_id: str,
    parts: PartsDep,
    caller: JobsRead,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> schemas.Page[schemas.JobCheckpoint]:
    """List a job's checkpoints, the newest first."""
    with parts.db.read() as session:
        job = get_job(session, caller.project_id, fine_tuning_job_id)
        return checkpoints(session, job, after=after, limit=limit)


def checkpoints(
    session: Session, job: Job, *, after: str | None = None, limit: int
) -> schemas.Page[schemas.JobCheckpoint]:
    """Return a page of the checkpoints of a job's latest training, the newest first."""
    # Those of a training that was done again have the names of later ones. `+ 0` keeps SQLite to the order of pages.
    latest = JobCheckpoint.attempt + 0 == job.attempt
    found = take(session, JobCheckpoint, latest, within=[(JobCheckpoint.job_id, job.id)], after=after, limit=limit)
    wanted = [row.model_id for row in found.rows if row.model_id is not None]
    query = select(Model.id).where(Model.id.in_(wanted), Model.status == "ready")
    ready = set(session.scalars(query)) if wanted else set()
    items = [
        schemas.JobCheckpoint(
            id=row.id,
            created_at=row.created_at,
            fine_tuned_model_checkpoint=row.name,
            fine_tuning_job_id=job.id,
            metrics=schemas.CheckpointMetrics.model_validate(finite(row.metrics)),
            step_number=row.step_number,
            usable=row.model_id in ready,
        )
        for row in found.rows
    ]
    return page(items, found.more)
