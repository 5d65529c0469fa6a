"""What is removed for good: content that has expired or was deleted, and what no row names."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import delete, exists, or_, select, union
from sqlalchemy.orm import Session

from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import (
    ENDED,
    ApiKey,
    File,
    GateDecision,
    IdempotentRequest,
    Job,
    JobEvent,
    JobMetadata,
    JobState,
    Model,
    Upload,
    UploadPart,
    WebSession,
)

GRACE_SECONDS = 86_400
"""How old content must be that no row names: what is being written has no row yet."""
DAY_SECONDS = 86_400


class Swept(NamedTuple):
    """How many of each were removed."""

    files: int
    uploads: int
    models: int
    requests: int
    sessions: int
    orphans: int


def sweep(db: Database, blobs: Blobs, now: int, settings: ServiceSettings) -> Swept:
    """Remove what has expired or was deleted. May be stopped at any point and done again, by several at once.

    Rows lose their content first and the store second: what is cut short leaves an orphan, which a later sweep finds,
    and never a row without what it names. A file that a job still needs stays until the job has ended.

    Args:
        db: the database.
        blobs: the object store.
        now: in seconds since 1970.
        settings: of the service.
    """
    gone: list[str] = []
    with db.write() as session:
        files = _expire_files(session, now, gone)
        uploads = _expire_uploads(session, now, gone)
        models = _forget_models(session, gone)
        requests = _count(session, delete(IdempotentRequest).where(IdempotentRequest.created_at < now - DAY_SECONDS))
        sessions = _count(session, delete(WebSession).where(WebSession.expires_at < now))
    for key in gone:
        blobs.delete(key)
    return Swept(files, uploads, models, requests, sessions, _sweep_orphans(db, blobs, now))


def erase_project(db: Database, blobs: Blobs, project_id: str, now: int) -> int:
    """Remove all content that a project brought or had made, revoke its keys, and return how much content went.

    Its rows stay as husks without names and texts, so that the audit log's subjects still mean something. Jobs must
    have ended or be cancelled first.

    Raises:
        ValueError: a job has not ended.
    """
    gone: list[str] = []
    with db.write() as session:
        jobs = select(Job.id).where(Job.project_id == project_id)
        if session.scalar(select(exists().where(Job.project_id == project_id, Job.status.not_in(ENDED)))):
            raise ValueError("a job of the project has not ended: cancel it first")
        for file in session.scalars(select(File).where(File.project_id == project_id)):
            gone += [file.blob] if file.blob else []
            file.blob, file.deleted_at, file.filename, file.sha256 = None, file.deleted_at or now, "", ""
        for upload in session.scalars(select(Upload).where(Upload.project_id == project_id)):
            gone += _parts(session, upload)
            upload.status, upload.filename = "cancelled", ""
        for model in session.scalars(select(Model).where(Model.project_id == project_id)):
            gone += [model.adapter] if model.adapter else []
            model.status, model.deleted_at, model.adapter = "deleted", model.deleted_at or now, None
        gone += session.scalars(select(GateDecision.adapter).where(GateDecision.job_id.in_(jobs)))
        for decision in session.scalars(select(GateDecision).where(GateDecision.job_id.in_(jobs))):
            decision.report = {**decision.report, "evidence": []}
        session.execute(delete(JobMetadata).where(JobMetadata.job_id.in_(jobs)))
        session.execute(delete(JobEvent).where(JobEvent.job_id.in_(jobs)))
        for job in session.scalars(select(Job).where(Job.project_id == project_id)):
            job.suffix, job.integrations = None, None
        for key in session.scalars(select(ApiKey).where(ApiKey.project_id == project_id)):
            key.revoked_at = key.revoked_at or now
    keys = set(gone)
    for name in keys:
        blobs.delete(name)
    return len(keys)


def _expire_files(session: Session, now: int, gone: list[str]) -> int:
    needed = exists().where(Job.status.not_in(ENDED), or_(Job.training_file == File.id, Job.validation_file == File.id))
    rows = session.scalars(select(File).where(File.expires_at < now, File.deleted_at.is_(None), ~needed)).all()
    for row in rows:
        gone += [row.blob] if row.blob else []
        row.blob, row.deleted_at = None, now
    return len(rows)


def _expire_uploads(session: Session, now: int, gone: list[str]) -> int:
    rows = session.scalars(select(Upload).where(Upload.expires_at < now, Upload.status == "pending")).all()
    for row in rows:
        gone += _parts(session, row)
        row.status = "expired"
    return len(rows)


def _parts(session: Session, upload: Upload) -> list[str]:
    parts = session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id)).all()
    for part in parts:
        session.delete(part)
    return [part.blob for part in parts]


def _forget_models(session: Session, gone: list[str]) -> int:
    rows = session.scalars(select(Model).where(Model.status == "deleted", Model.adapter.is_not(None))).all()
    for row in rows:
        gone += [row.adapter] if row.adapter else []
        row.adapter = None
    return len(rows)


def _sweep_orphans(db: Database, blobs: Blobs, now: int) -> int:
    old = [stored.key for stored in blobs.stored() if stored.at is not None and stored.at < now - GRACE_SECONDS]
    if not old:
        return 0
    with db.read() as session:
        deleted = select(Model.adapter_digest).where(Model.status == "deleted")
        named = union(
            select(File.blob).where(File.blob.is_not(None)),
            select(UploadPart.blob),
            select(JobState.rest),
            select(JobState.rows).where(JobState.rows.is_not(None)),
            select(Model.adapter).where(Model.adapter.is_not(None)),
            select(GateDecision.adapter).where(GateDecision.adapter_digest.not_in(deleted)),
        )
        used = set(session.scalars(named))
    orphans = [key for key in old if key not in used]
    for key in orphans:
        blobs.delete(key)
    return len(orphans)


def _count(session: Session, statement: object) -> int:
    return session.execute(statement).rowcount  # type: ignore[call-overload]
