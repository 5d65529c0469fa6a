"""Removes all that a project brought or had made, and leaves husks that the audit log can still speak of."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from holdtrue.errors import SpecError
from holdtrue.service import audit, auth
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import (
    ENDED,
    ApiKey,
    File,
    GateDecision,
    IdempotentRequest,
    Job,
    JobCheckpoint,
    JobEvent,
    JobMetadata,
    JobState,
    Model,
    Project,
    Receipt,
    Upload,
    UploadPart,
    WebSession,
)


class Erased(NamedTuple):
    """How much was removed: files, jobs' own texts, models, and pieces of content in the object store."""

    files: int
    jobs: int
    models: int
    content: int


def erase_project(db: Database, blobs: Blobs, project_id: str, now: int, *, actor: str = "system") -> Erased:
    """Remove all content that a project brought or had made, and revoke its keys. May be done again at any time.

    Files, uploads, jobs and models stay as husks: ids, times, numbers, states. Events, metadata, checkpoints, receipts
    and kept answers go. The audit log stays whole: it names ids, and the SHA-256 of files. The project itself and what
    it used stay as well.

    Args:
        db: the database.
        blobs: the object store.
        project_id: whose content it is.
        now: in seconds since 1970.
        actor: who does this, for the audit log.

    Raises:
        SpecError: there is no such project, or a job of it has not ended.
    """
    with db.write() as session:
        # Who adds to a project locks it first, and then looks whether their key still works.
        if session.get(Project, project_id, with_for_update=True) is None:
            raise SpecError(f"there is no project {project_id!r}; `holdtrue projects list` lists them")
        unfinished = select(Job.id).where(Job.project_id == project_id, Job.status.not_in(ENDED))
        if (job := session.scalar(unfinished.limit(1))) is not None:
            raise SpecError(f"the job {job} has not ended; cancel it first")
        session.execute(delete(IdempotentRequest).where(IdempotentRequest.project_id == project_id))
        gone: set[str | None] = set()
        files = _files(session, project_id, now, gone)
        models = _models(session, project_id, now, gone)
        jobs = _jobs(session, project_id, gone)
        _keys(session, project_id, now)
        keys = {key for key in gone if key}
        erased = Erased(files, jobs, models, len(keys))
        audit.add(session, actor, "project.erase", project_id, now=now, detail=erased._asdict())
    db.empty_log()
    for key in keys:
        blobs.delete(key)
    return erased


def _files(session: Session, project_id: str, now: int, gone: set[str | None]) -> int:
    rows = session.scalars(select(File).where(File.project_id == project_id)).all()
    for row in rows:
        gone.add(row.blob)
        row.blob, row.deleted_at, row.filename, row.sha256 = None, row.deleted_at or now, "", ""
        row.status_details = None
    for upload in session.scalars(select(Upload).where(Upload.project_id == project_id)):
        upload.status = "cancelled" if upload.status == "pending" else upload.status
        upload.filename, upload.mime_type = "", ""
    uploads = select(Upload.id).where(Upload.project_id == project_id)
    parts = delete(UploadPart).where(UploadPart.upload_id.in_(uploads)).returning(UploadPart.blob)
    gone.update(session.scalars(parts.execution_options(synchronize_session=False)))
    return len(rows)


def _models(session: Session, project_id: str, now: int, gone: set[str | None]) -> int:
    rows = session.scalars(select(Model).where(Model.project_id == project_id)).all()
    for row in rows:
        gone.add(row.adapter)
        row.status, row.deleted_at, row.adapter = "deleted", row.deleted_at or now, None
        row.name = f"erased:{row.id}"
    return len(rows)


def _jobs(session: Session, project_id: str, gone: set[str | None]) -> int:
    of_project = select(Job.id).where(Job.project_id == project_id)
    for decision in session.scalars(select(GateDecision).where(GateDecision.job_id.in_(of_project))):
        gone.add(decision.adapter)
        decision.adapter = ""
        decision.report = {"outcome": decision.outcome, "decisions": decision.report.get("decisions", [])}
    for state in session.scalars(select(JobState).where(JobState.job_id.in_(of_project))):
        gone.update((state.rest, state.rows))
        session.delete(state)
    for table in (JobMetadata, JobEvent, JobCheckpoint, Receipt):
        statement = delete(table).where(table.job_id.in_(of_project))
        session.execute(statement.execution_options(synchronize_session=False))
    rows = session.scalars(select(Job).where(Job.project_id == project_id)).all()
    for row in rows:
        row.model, row.suffix, row.integrations, row.fine_tuned_model = row.base_model, None, None, None
        row.tagged = False
        if row.error is not None:
            row.error = {"code": row.error.get("code"), "message": "erased", "param": row.error.get("param")}
    return len(rows)


def _keys(session: Session, project_id: str, now: int) -> None:
    of_project = select(ApiKey.id).where(ApiKey.project_id == project_id)
    session.execute(delete(WebSession).where(WebSession.key_id.in_(of_project)))
    for row in session.scalars(select(ApiKey).where(ApiKey.project_id == project_id)):
        auth.revoke(session, row, now)
        row.name = ""
