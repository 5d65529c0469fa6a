"""A job's states and the one table of what may follow what. Every change tells its event in the same transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from holdtrue.errors import HoldtrueError
from holdtrue.service import clock, ids
from holdtrue.service.jobs import events
from holdtrue.service.store.schema import ENDED, Job, JobMetadata

NEXT: Mapping[str, frozenset[str]] = {
    "validating_files": frozenset({"queued", "paused", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"validating_files", "queued", "cancelled"}),
    "succeeded": frozenset(),
    # Only a person who releases what the gate blocked: publish.decide.
    "failed": frozenset({"succeeded"}),
    "cancelled": frozenset(),
}


class TransitionError(HoldtrueError):
    """A job cannot go where it was asked to from where it is."""


def create(session: Session, *, metadata: Mapping[str, str] | None = None, **values: Any) -> Job:
    """Make a job in ``validating_files``; ``values`` are columns of ``Job`` that the caller decides."""
    job = Job(
        id=ids.new("ftjob"),
        status="validating_files",
        created_at=clock.now(),
        wanted="run",
        held=False,
        attempt=0,
        tries=0,
        charged_tokens=0,
        fence=0,
        tagged=bool(metadata),
        **values,
    )
    session.add(job)
    session.flush()
    of_job = {"job_id": job.id, "project_id": job.project_id, "seq": job.seq}
    session.add_all(JobMetadata(**of_job, key=key, value=value) for key, value in (metadata or {}).items())
    events.add(session, job, f"Created fine-tuning job: {job.id}")
    events.add(session, job, "Validating the files")
    return job


def move(
    session: Session, job: Job, status: str, message: str, *, error: Mapping[str, Any] | None = None, **event: Any
) -> None:
    """Put a locked job into another status.

    Args:
        session: of the transaction that holds the job's row.
        job: the job.
        status: where to.
        message: of the event.
        error: ``code``, ``message``, ``param`` for a job that fails.
        event: more of the event: ``level``, ``data``, ``type``, ``once``.

    Raises:
        TransitionError: the table has no such step.
    """
    if status not in NEXT[job.status]:
        raise TransitionError(f"a job that is {job.status} cannot become {status}")
    now = clock.now()
    job.status = status
    if status == "running" and job.started_at is None:
        job.started_at = now
    if status != "running":
        job.lease_owner, job.lease_until = None, None
        job.fence += 1  # whoever still believes to hold it can write no more
        job.estimated_finish = None
    if status in ENDED:
        job.finished_at, job.held = now, False
        job.error = None if error is None else dict(error)
    events.add(session, job, message, **event)


def request(session: Session, job: Job, wanted: str) -> None:
    """Do what a customer asks of a locked job: ``pause``, ``run`` or ``cancel``; asked twice is as asked once.

    A cancelled job ends at once, whoever held it. A running one pauses when its worker has saved a checkpoint. One that
    is to go on and does so already, since an earlier answer was lost or nobody paused it, just does.

    Raises:
        TransitionError: the job has ended, or waits for a person.
    """
    if wanted == "cancel" and job.status == "cancelled":
        return
    if job.status in ENDED:
        raise TransitionError(f"job {job.id} has {job.status} already")
    if job.held and wanted != "cancel":
        raise TransitionError(f"job {job.id} has been trained and waits for a person's decision on its gate")
    match wanted:
        case "cancel":
            move(session, job, "cancelled", "The job was cancelled")
        case "pause" if job.status == "running":
            if job.wanted != "pause":
                events.add(session, job, "Pausing: the job stops at its next checkpoint")
            job.wanted = "pause"
        case "pause":
            if job.status != "paused":
                move(session, job, "paused", "The job is paused")
            job.wanted = "pause"
        case "run":
            if job.status == "paused":
                back = "validating_files" if job.resolved is None else "queued"
                move(session, job, back, "The job goes on")
            elif job.wanted == "pause":
                events.add(session, job, "The job goes on")
            job.wanted = "run"
        case _:
            raise ValueError(wanted)
