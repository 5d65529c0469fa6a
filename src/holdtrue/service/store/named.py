"""What of the object store is in use: the keys that rows name and whose content somebody may still want."""

from __future__ import annotations

from sqlalchemy import select, union
from sqlalchemy.orm import Session

from holdtrue.service.store.schema import File, GateDecision, JobState, Model, Upload, UploadPart


def named(session: Session) -> set[str]:
    """Return every key in use. What a deleted file, a closed upload or a deleted model still names is not."""
    query = union(
        select(File.blob).where(File.blob.is_not(None), File.deleted_at.is_(None)),
        select(UploadPart.blob).join(Upload, Upload.id == UploadPart.upload_id).where(Upload.status == "pending"),
        select(JobState.rest),
        select(JobState.rows).where(JobState.rows.is_not(None)),
        select(Model.adapter).where(Model.adapter.is_not(None), Model.status != "deleted"),
        select(GateDecision.adapter).where(GateDecision.adapter != ""),
    )
    return {key for key in session.scalars(query) if key is not None}
