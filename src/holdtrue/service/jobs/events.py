"""What happened to a job, in the order in which its transactions told it."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from holdtrue.service import clock, ids
from holdtrue.service.store.schema import Job, JobEvent

Level = Literal["info", "warn", "error"]
Kind = Literal["message", "metrics", "moderation_checks"]


def add(
    session: Session,
    job: Job,
    message: str,
    *,
    level: Level = "info",
    type: Kind = "message",
    data: dict[str, Any] | None = None,
    once: str | None = None,
) -> None:
    """Append an event within the caller's transaction.

    Args:
        session: of a transaction in which the job is held or locked, so that no other writes its events meanwhile.
        job: what it happened to.
        message: for the customer; never another tenant's data, never a path.
        level, type: as OpenAI's events have them, and ``moderation_checks`` for a gate.
        data: JSON values.
        once: names what must be told a single time however often the work behind it is done again.
    """
    if once is not None and session.scalar(select(exists().where(JobEvent.job_id == job.id, JobEvent.once == once))):
        return
    session.add(
        JobEvent(
            id=ids.new("ftevent"),
            job_id=job.id,
            level=level,
            type=type,
            message=message,
            data=data,
            once=once,
            created_at=clock.now(),
        )
    )
    session.flush()
