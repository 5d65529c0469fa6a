"""What is removed for good: content that has expired or was deleted, and what no row names."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import delete, exists, or_, select
from sqlalchemy.orm import Session

from holdtrue.service import audit
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.named import named
from holdtrue.service.store.schema import (
    ENDED,
    JOB_STATUSES,
    File,
    GateDecision,
    IdempotentRequest,
    Job,
    JobState,
    Model,
    Project,
    Upload,
    UploadPart,
    WebSession,
)

GRACE_SECONDS = 86_400
"""How old content must be that no row names: what is being written has no row yet."""
DAY_SECONDS = 86_400
_AT_ONCE = 500
_ACTIVE = tuple(status for status in JOB_STATUSES if status not in ENDED)


class Swept(NamedTuple):
    """How many of each were removed: files' content, uploads, models' adapters, ended jobs' states, and the rest."""

    files: int = 0
    uploads: int = 0
    models: int = 0
    states: int = 0
    requests: int = 0
    sessions: int = 0
    orphans: int = 0
    drafts: int = 0


def sweep(db: Database, blobs: Blobs, now: int, settings: ServiceSettings, *, orphans: bool = True) -> Swept:
    """Remove what has expired or was deleted. May be stopped at any point and done again, by several at once.

    Rows lose their content first and the store second: what is cut short leaves an orphan, which a later sweep finds,
    and never a row without what it names. A file that a job still needs stays until the job has ended. Locks are taken
    in the order that ``quotas.lock_project`` states.

    Args:
        db: the database.
        blobs: the object store.
        now: in seconds since 1970.
        settings: of the service.
        orphans: whether to look through the whole store for what no row names; that takes a list of all of it, and is
            worth doing every few hours.
    """
    gone: list[str] = []
    with db.write() as session:
        expired = _expire_files(session, now, gone)
        swept = Swept(
            files=len(expired) + _finish_deletions(session, now, gone),
            uploads=_close_uploads(session, now, gone),
            models=_forget_models(session, gone),
            states=_forget_states(session, gone),
        )
        for file_id in expired:
            audit.add(session, "system", "file.expire", file_id, now=now)
    with db.write() as session:
        swept = swept._replace(
            requests=_count(session, delete(IdempotentRequest).where(IdempotentRequest.created_at < now - DAY_SECONDS)),
            sessions=_count(session, delete(WebSession).where(WebSession.expires_at < now)),
        )
    if any(swept):
        db.empty_log()
    for key in gone:
        blobs.delete(key)
    if not orphans:
        return swept
    drafts = blobs.drop_drafts(now - GRACE_SECONDS)
    return swept._replace(orphans=_sweep_orphans(db, blobs, now), drafts=drafts)


def _expire_files(session: Session, now: int, gone: list[str]) -> list[str]:
    needed = exists().where(Job.status.in_(_ACTIVE), or_(Job.training_file == File.id, Job.validation_file == File.id))
    due = (File.expires_at <= now, File.deleted_at.is_(None), ~needed)
    found = set(session.scalars(select(File.project_id).where(*due).order_by(File.expires_at).limit(_AT_ONCE)))
    if not found:
        return []
    # Their projects' sums change with them, and nobody creates a job with one of them meanwhile.
    session.execute(select(Project.id).where(Project.id.in_(found)).order_by(Project.id).with_for_update())
    still = select(File).where(File.project_id.in_(found), *due).order_by(File.expires_at).limit(_AT_ONCE)
    rows = session.scalars(still.with_for_update(skip_locked=True)).all()
    for row in rows:
        gone += [row.blob] if row.blob else []
        row.blob, row.deleted_at, row.filename = None, now, ""
    return [row.id for row in rows]


def _finish_deletions(session: Session, now: int, gone: list[str]) -> int:
    """Take what deleted files still name: whoever deleted them died before the content was gone."""
    query = select(File).where(File.deleted_at <= now, File.blob.is_not(None))
    rows = session.scalars(query.order_by(File.deleted_at).limit(_AT_ONCE).with_for_update(skip_locked=True)).all()
    for row in rows:
        gone += [row.blob] if row.blob else []
        row.blob = None
    return len(rows)


def _close_uploads(session: Session, now: int, gone: list[str]) -> int:
    """Expire uploads, and take the parts of those that are pending no more."""
    query = select(Upload).where(Upload.expires_at <= now, Upload.status == "pending")
    rows = session.scalars(query.order_by(Upload.expires_at).limit(_AT_ONCE).with_for_update(skip_locked=True)).all()
    for row in rows:
        row.status, row.filename = "expired", ""
    session.flush()
    # Parts are few, those of uploads that are under way; uploads are many.
    status = select(Upload.status).where(Upload.id == UploadPart.upload_id).scalar_subquery()
    parts = select(UploadPart.id).where(status != "pending").order_by(UploadPart.id).limit(_AT_ONCE)
    taken = delete(UploadPart).where(UploadPart.id.in_(session.scalars(parts).all())).returning(UploadPart.blob)
    gone += session.scalars(taken).all()
    return len(rows)


def _forget_models(session: Session, gone: list[str]) -> int:
    """Take the adapters of deleted models, and those of trainings of a job that were done again for its model."""
    query = select(Model).where(Model.status == "deleted", Model.adapter.is_not(None))
    rows = session.scalars(query.order_by(Model.seq).limit(_AT_ONCE).with_for_update(skip_locked=True)).all()
    for row in rows:
        adapters = {row.adapter} if row.adapter else set()
        mine = GateDecision.adapter == row.adapter
        if row.kind == "tuned":
            mine = or_(mine, GateDecision.action == "retrain")
        decisions = select(GateDecision).where(GateDecision.job_id == row.job_id, GateDecision.adapter != "", mine)
        for decision in session.scalars(decisions):
            adapters.add(decision.adapter)
            decision.adapter = ""
        gone += sorted(adapters)
        row.adapter = None
    return len(rows)


def _forget_states(session: Session, gone: list[str]) -> int:
    """Take what jobs that have ended would have gone on from: their encoded rows are among it."""
    # States are few, those of jobs that are under way; jobs are many.
    status = select(Job.status).where(Job.id == JobState.job_id).scalar_subquery()
    query = select(JobState).where(status.in_(ENDED)).order_by(JobState.job_id).limit(_AT_ONCE)
    rows = session.scalars(query.with_for_update(skip_locked=True)).all()
    for row in rows:
        gone += [key for key in (row.rest, row.rows) if key is not None]
        session.delete(row)
    return len(rows)


def _sweep_orphans(db: Database, blobs: Blobs, now: int) -> int:
    old = [stored.key for stored in blobs.stored() if stored.at is not None and stored.at < now - GRACE_SECONDS]
    if not old:
        return 0
    with db.read() as session:
        used = named(session)
    orphans = [key for key in old if key not in used]
    for key in orphans:
        blobs.delete(key)
    return len(orphans)


def _count(session: Session, statement: object) -> int:
    return session.execute(statement).rowcount  # type: ignore[call-overload]
