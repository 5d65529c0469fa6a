"""What a project may use: requests a minute, jobs at once, tokens a day, bytes stored."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from limits import RateLimitItemPerMinute
from limits.storage import storage_from_string
from limits.strategies import SlidingWindowCounterRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from holdtrue.errors import HoldtrueError, SpecError
from holdtrue.service import clock
from holdtrue.service.store.schema import ENDED, JOB_STATUSES, Job, Project, Upload, UploadPart, Usage

GIBIBYTE = 2**30
_PATIENCE = 3.0  # seconds for an answer of Redis, whose client waits for ever by itself
ACTIVE = tuple(status for status in JOB_STATUSES if status not in ENDED)


class Limits(BaseModel):
    """The most that one project may use. A project's own ``limits`` override the service's, name by name.

    Attributes:
        requests_per_minute: of any kind, over all of its keys.
        jobs_active: jobs that have not ended.
        tokens_per_day: trained and chatted, prompts included; a day is one of UTC.
        storage_bytes: of its files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: int = Field(default=3000, ge=1, le=10**9)
    jobs_active: int = Field(default=20, ge=0, le=10**9)
    tokens_per_day: int = Field(default=20_000_000, ge=0, le=10**15)
    storage_bytes: int = Field(default=20 * GIBIBYTE, ge=0, le=10**18)

    def with_overrides(self, values: Mapping[str, Any]) -> Limits:
        """Return these limits with a project's own; ``SpecError`` for a name or value that is none."""
        try:
            return Limits.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            first = error.errors()[0]
            raise SpecError(f"limits.{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


class QuotaError(HoldtrueError):
    """A quota is used up; ``code`` names it, ``retry_after`` is in seconds where waiting helps."""

    def __init__(self, code: str, message: str, retry_after: int | None = None) -> None:
        self.code = code
        self.retry_after = retry_after
        super().__init__(message)


class Rate(NamedTuple):
    """Where a project stands in its minute: whether this request is within it, what is left, seconds until more is."""

    allowed: bool
    limit: int
    remaining: int
    reset_seconds: float


class RateLimiter:
    """Requests a minute over a sliding window; in memory for one API process, in Redis for several.

    Beside the counts it keeps marks: what all API processes are to know for some minutes. All that it does raises the
    ``StorageError`` of ``limits`` where its storage cannot be reached.
    """

    def __init__(self, storage: str = "memory://") -> None:
        waits = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), _PATIENCE)
        options = waits if storage.startswith("redis") else {}
        self._storage = storage_from_string(storage, wrap_exceptions=True, **options)
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    def check(self) -> None:
        """Raise the ``StorageError`` of ``limits`` unless the storage answers."""
        self._storage.get("check")

    def set_mark(self, name: str, seconds: int, at: int) -> None:
        """Give a name a mark of a time, in microseconds and not far from now, for so many seconds."""
        self._storage.clear(name)
        self._storage.incr(name, seconds, at)

    def mark(self, name: str) -> int:
        """Return the time of a name's mark, 0 where it has none."""
        found = cast(int, self._storage.get(name))  # of a storage that is not asyncio's
        # A storage can only add: where several set a mark at once, it has the sum of their times.
        return found // max(1, round(found / clock.microseconds()))

    def hit(self, project_id: str, per_minute: int) -> Rate:
        """Count one request."""
        item = RateLimitItemPerMinute(per_minute)
        allowed = self._limiter.hit(item, project_id)
        stats = self._limiter.get_window_stats(item, project_id)
        return Rate(allowed, per_minute, max(0, stats.remaining), max(0.0, stats.reset_time - time.time()))


def today(now: int) -> str:
    """Return the day of a time, in UTC, as usage counts it."""
    return datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()


def add(session: Session, project_id: str, counter: str, amount: int, *, now: int) -> None:
    """Add to a project's usage of the day."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    row = insert(Usage).values(project_id=project_id, day=today(now), counter=counter, amount=amount)
    session.execute(
        row.on_conflict_do_update(
            index_elements=["project_id", "day", "counter"], set_={"amount": Usage.amount + amount}
        )
    )


def used_today(session: Session, project_id: str, *, now: int) -> dict[str, int]:
    """Return a project's usage of the day, by counter."""
    rows = session.execute(
        select(Usage.counter, Usage.amount).where(Usage.project_id == project_id, Usage.day == today(now))
    )
    return {row.counter: row.amount for row in rows}


def charge_training(session: Session, job: Job, tokens: int, *, now: int) -> None:
    """Add to the usage of a job's project what the job has trained and not been charged for yet.

    Args:
        session: of a transaction in which the job is locked, and before it its project.
        tokens: that its training under way has trained so far; those before it are in ``job.trained_tokens``. Steps
            that another worker trains again count once.
    """
    due = (job.trained_tokens or 0) + tokens - job.charged_tokens
    if due > 0:
        job.charged_tokens += due
        add(session, job.project_id, "training_tokens", due, now=now)


def stored_bytes(session: Session, project_id: str) -> int:
    """Return the bytes of a project's files."""
    return int(session.scalar(select(Project.stored_bytes).where(Project.id == project_id)) or 0)


def pending_bytes(session: Session, project_id: str, *, besides: str | None = None) -> int:
    """Return the bytes of the parts of a project's pending uploads, but for the upload ``besides``."""
    query = select(func.coalesce(func.sum(UploadPart.bytes), 0)).join(Upload, Upload.id == UploadPart.upload_id)
    query = query.where(Upload.project_id == project_id, Upload.status == "pending")
    return int(session.scalar(query if besides is None else query.where(Upload.id != besides)) or 0)


def jobs_active(session: Session, project_id: str) -> int:
    """Return how many jobs of a project have not ended."""
    query = select(func.count()).select_from(Job).where(Job.project_id == project_id, Job.status.in_(ACTIVE))
    return int(session.scalar(query) or 0)


def check_tokens(session: Session, project_id: str, limits: Limits, *, now: int) -> None:
    """Refuse what would use tokens once the day's are used up (``QuotaError``)."""
    if _tokens_left(session, project_id, limits, now) <= 0:
        raise _tokens_error(f"the project's {limits.tokens_per_day} tokens of today are used up", now)


def check_training(session: Session, project_id: str, limits: Limits, tokens: int, *, now: int) -> None:
    """Refuse to train more tokens than are left of the day's (``QuotaError``); jobs under way are not added up."""
    left = max(0, _tokens_left(session, project_id, limits, now))
    if tokens > left:
        raise _tokens_error(
            f"the job would train {tokens} tokens, and {left} of the project's {limits.tokens_per_day} are left today",
            now,
        )


def _tokens_left(session: Session, project_id: str, limits: Limits, now: int) -> int:
    used = used_today(session, project_id, now=now)
    return limits.tokens_per_day - used.get("training_tokens", 0) - used.get("chat_tokens", 0)


def _tokens_error(what: str, now: int) -> QuotaError:
    left = 86_400 - now % 86_400
    return QuotaError(
        "tokens_per_day", f"{what}; more are there in {math.ceil(left / 3600)} hours (UTC midnight)", left
    )


def lock_project(session: Session, project_id: str) -> None:
    """Let nobody else add to what a project has until the transaction ends.

    Transactions wait for each other in one order, so that no two do so in a circle: projects (several by their ids),
    kept answers, files, uploads and their parts, models, gate decisions, states, jobs, browsers' sessions, keys, and at
    last the audit log. Who needs several locks takes them in this order, or passes over what is locked. To add a row
    that names a project (a file, a model, the day's first usage) locks it too. A worker takes its project where it adds
    such rows, and next its job: the rest of a job under way is left alone by those who come from the project.
    """
    session.get_one(Project, project_id, with_for_update=True)


def check_jobs(session: Session, project_id: str, limits: Limits) -> None:
    """Refuse a job beyond those that a project may have at once (``QuotaError``); the project is locked."""
    active = jobs_active(session, project_id)
    if active >= limits.jobs_active:
        raise QuotaError(
            "jobs_active",
            f"the project has {active} jobs that have not ended, of {limits.jobs_active} at once; wait for one or "
            "cancel one",
            60,
        )


def check_storage(session: Session, project_id: str, limits: Limits, more: int, *, upload: str | None = None) -> None:
    """Refuse bytes beyond those that a project may store (``QuotaError``), in files and in parts of pending uploads.

    Args:
        session: of the transaction that writes the row of what comes, in which the project is locked; of any other,
            what is found may have changed since.
        more: bytes that come.
        upload: whose parts do not count, since they end as the file that comes.
    """
    files, parts = stored_bytes(session, project_id), pending_bytes(session, project_id, besides=upload)
    if files + parts + more > limits.storage_bytes:
        unfinished = f" and the {parts} of unfinished uploads" if parts else ""
        raise QuotaError(
            "storage_bytes",
            f"{more} bytes more than the {files} stored{unfinished} would exceed the project's "
            f"{limits.storage_bytes}; delete files{' or cancel uploads' if parts else ''}",
        )
