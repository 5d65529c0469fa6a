"""Who holds a job: a lease that runs out, and a fencing number that grows with each, checked under every write.

Not a library for durable execution: those that speak SQLite and PostgreSQL both (DBOS is one) bring a dead host's work
back through a control plane that is not part of them, and none fences the writes that a job makes in our own tables.
A fenced row gives both in the database that holds the job anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from holdtrue.errors import HoldtrueError
from holdtrue.service import clock, quotas
from holdtrue.service.jobs import events, lifecycle
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Job
from holdtrue.service.store.walk import walk

MOST_TRIES = 8
"""Leases that may be lost to dying workers, without anything saved that goes further, before a job is given up."""
LONGEST_WAIT = 300.0
"""Seconds for which a job that was given back may be left alone."""

_STEP = 10
"""A lease with so many times its length to go was taken before the clock was set back, and is void.

Its length is not stored: it is the taker's own, and all workers of a service have the same.
"""


class LeaseLostError(HoldtrueError):
    """Somebody else holds the job by now, or it has ended: what this worker would write is void."""


@dataclass(frozen=True)
class Lease:
    """A job in a worker's hands.

    Attributes:
        db: where the job is.
        job_id: which.
        owner: the worker's name.
        fence: this lease's number; every write checks it.
        seconds: how long the worker may be silent.
    """

    db: Database
    job_id: str
    owner: str
    fence: int
    seconds: float

    def renew(self) -> str:
        """Go on holding the job, and return what its customer wants of it (``run``, ``pause``).

        Raises:
            LeaseLostError: it is no longer this worker's.
        """
        with self.db.write() as session:
            until = clock.shared(session) + self.seconds
            held = (Job.id == self.job_id, Job.fence == self.fence, Job.status == "running")
            wanted = session.scalar(update(Job).where(*held).values(lease_until=until).returning(Job.wanted))
        if wanted is None:
            raise self._lost()
        return wanted

    @contextlib.contextmanager
    def write(self, *, project: bool = False) -> Iterator[tuple[Session, Job]]:
        """A transaction on the job's own rows, in which the lease has been checked under the row's lock.

        Args:
            project: whether rows of its project are written too, such as files, models or usage; it is locked first,
                since requests lock it before its jobs.

        Raises:
            LeaseLostError: at the start, and nothing is written.
        """
        with self.db.write() as session:
            owner = session.scalar(select(Job.project_id).where(Job.id == self.job_id)) if project else None
            if owner is not None:
                quotas.lock_project(session, owner)
            job = session.scalar(select(Job).where(Job.id == self.job_id).with_for_update())
            if job is None or job.fence != self.fence or job.status != "running":
                raise self._lost()
            yield session, job

    def release(self, message: str = "The worker stopped; the job goes on with another", after: float = 0) -> None:
        """Give the job back unfinished, for anybody to take; that is no death. Nothing happens if it was lost.

        Args:
            message: of the event.
            after: seconds for which nobody takes it, at most ``LONGEST_WAIT``.
        """
        with contextlib.suppress(LeaseLostError), self.write() as (session, job):
            job.tries -= 1
            lifecycle.move(session, job, "queued", message)
            if after > 0:
                job.lease_until = clock.shared(session) + min(after, LONGEST_WAIT)

    def _lost(self) -> LeaseLostError:
        return LeaseLostError(f"{self.owner} no longer holds {self.job_id} (fence {self.fence})")


def take(db: Database, owner: str, seconds: float) -> Lease | None:
    """Take the oldest job whose worker has been silent too long, or else that waits; ``None`` where there is none.

    Of any number who call this at once, one gets a job.
    """
    while True:
        with db.write() as session:
            now = clock.shared(session)
            job = _next(session, now, seconds)
            if job is None:
                return None
            if job.status == "running":
                events.add(session, job, "The job's worker has gone silent; another takes over", level="warn")
            if job.wanted == "pause":
                lifecycle.move(session, job, "paused", "The job is paused")
                continue
            if job.tries >= MOST_TRIES:
                _give_up(session, job)
                continue
            if job.status == "queued":
                lifecycle.move(session, job, "running", "The job is running")
            job.fence += 1
            job.tries += 1
            job.lease_owner, job.lease_until = owner, now + seconds
            return Lease(db, job.id, owner, job.fence, seconds)


def _next(session: Session, now: float, seconds: float) -> Job | None:
    """Two questions, since an index answers each without a look at what has ended or waits behind."""
    over = or_(Job.lease_until < now, Job.lease_until > now + _STEP * seconds)
    silent = select(Job).where(Job.held.is_(False), over)
    # A queued job's is when its wait ends; one that is too far off was set before the clock stepped.
    ready = select(Job).where(
        or_(Job.lease_until.is_(None), Job.lease_until <= now, Job.lease_until > now + LONGEST_WAIT)
    )
    for status, query in (("running", silent), ("queued", ready)):
        oldest = walk(session, query, [(Job.status, status)], Job.seq, down=False).limit(1)
        job = session.scalar(oldest.with_for_update(skip_locked=True))
        if job is not None:
            return job
    return None


def _give_up(session: Session, job: Job) -> None:
    if job.status == "queued":
        lifecycle.move(session, job, "running", "The job is running")
    error = {
        "code": "server_error",
        "message": f"the job was begun {job.tries} times, and its worker died or failed each time before it got "
        "any further; nothing was released",
        "param": None,
    }
    lifecycle.move(session, job, "failed", error["message"] or "", error=error, level="error")
