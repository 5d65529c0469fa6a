"""Validates the files of new jobs, and removes for good what is to be removed. Any number of dispatchers may run."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from holdtrue.data import validate_chat
from holdtrue.errors import DataError, HoldtrueError, Problem
from holdtrue.service import clock
from holdtrue.service.jobs import lifecycle
from holdtrue.service.policy import PolicyDocument, RefusalError, settle
from holdtrue.service.policy import store as policies
from holdtrue.service.scratch import Scratch
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import retention
from holdtrue.service.store.away import StoreAwayError
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import File, Job, Policy
from holdtrue.service.store.walk import walk

log = structlog.get_logger()
IDLE_SECONDS = 0.5
SWEEP_SECONDS = 60.0
ORPHAN_SECONDS = 4 * 3600.0
"""Between two looks through the whole object store, which takes a list of all of it."""
FIRST_DELAY, LONGEST_DELAY = 5.0, 300.0
"""Seconds for which a job is left alone whose validation failed for no fault of its own: at first, and at most."""
_SHOWN = 10


@dataclass(frozen=True)
class _Fault:
    param: str
    message: str
    code: str = "invalid_file"


class _Aside(NamedTuple):
    until: float  # of the monotonic clock
    delay: float


class _Waiting(NamedTuple):
    job_id: str
    document: PolicyDocument
    wishes: dict[str, int | float | str]
    files: dict[str, tuple[str | None, str]]  # param -> the blob's key and the file's id


class Dispatcher:
    """Looks for work twice a second. Projects take turns, so that none waits for all that another has sent."""

    def __init__(self, settings: ServiceSettings, *, db: Database | None = None, blobs: Blobs | None = None) -> None:
        self._settings = settings
        self._db = db or Database(settings.database)
        self._blobs = blobs or Blobs(settings.blobs)
        self._scratch = Scratch(settings.home)
        self._looked = float("-inf")
        self._aside: dict[str, _Aside] = {}
        self._turns: dict[str, int] = {}  # project -> the number of its last turn

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop; what fails unforeseen is logged and tried again."""
        swept, busy = float("-inf"), False
        while not stop.is_set():
            try:
                busy = self.validate_one()
            except Exception:
                log.exception("dispatcher failed")
                busy = False
            # Apart: what cannot be validated does not keep what has expired, which may be all that fills the disk.
            if time.monotonic() - swept >= SWEEP_SECONDS:
                swept = time.monotonic()
                try:
                    self.sweep()
                except Exception:
                    log.exception("sweep failed")
            if not busy:
                stop.wait(IDLE_SECONDS)

    def sweep(self) -> None:
        """Remove what has expired."""
        now = time.monotonic()  # a clock that is set back would keep the next look waiting
        due = now - self._looked >= ORPHAN_SECONDS
        found = retention.sweep(self._db, self._blobs, clock.now(), self._settings, orphans=due)
        self._looked = now if due else self._looked
        if any(found):
            log.info("removed what had expired", **found._asdict())

    def validate_one(self) -> bool:
        """Validate the files of a new job and queue it, or fail it; say whether there was one.

        A job that cannot be validated now, since the object store is away or a disk full, is left alone for a while.
        """
        job_id = self._next()
        if job_id is None:
            return False
        try:
            self._validate(job_id)
            self._aside.pop(job_id, None)
        except Exception:
            before = self._aside.get(job_id)
            delay = FIRST_DELAY if before is None else min(2 * before.delay, LONGEST_DELAY)
            self._aside[job_id] = _Aside(time.monotonic() + delay, delay)
            log.exception("cannot validate", job=job_id, again_in_seconds=delay)
        return True

    def _next(self) -> str | None:
        """Return the oldest new job of the project whose last turn is the longest ago."""
        with self._db.read() as session:
            pairs: Any = select(Job.id, Job.project_id)
            new = walk(session, pairs, [(Job.status, "validating_files")], Job.seq, down=False)
            rows = session.execute(new).all()
        ids, now = {row.id for row in rows}, time.monotonic()
        self._aside = {job_id: aside for job_id, aside in self._aside.items() if job_id in ids}
        first: dict[str, str] = {}
        for row in rows:
            if row.id not in self._aside or self._aside[row.id].until <= now:
                first.setdefault(row.project_id, row.id)
        if not first:
            return None
        project = min(first, key=lambda project: self._turns.get(project, 0))
        self._turns[project] = max(self._turns.values(), default=0) + 1
        return first[project]

    def _validate(self, job_id: str) -> None:
        waiting = self._read(job_id)
        fault = self._check(waiting)
        with self._db.write() as session:
            job = session.scalar(select(Job).where(Job.id == waiting.job_id).with_for_update())
            if job is None or job.status != "validating_files":
                return  # another dispatcher was faster, or the job was cancelled or paused meanwhile
            if fault is None:
                job.resolved = dict(settle(waiting.document, job.hyperparameters))
                lifecycle.move(session, job, "queued", "Files validated, moving job to queued state")
            else:
                error = {"code": fault.code, "message": fault.message, "param": fault.param}
                lifecycle.move(session, job, "failed", "The job failed: " + fault.message, error=error, level="error")
        log.info("validated", job=waiting.job_id, valid=fault is None)

    def _read(self, job_id: str) -> _Waiting:
        with self._db.read() as session:
            job = session.scalars(select(Job).where(Job.id == job_id)).one()
            document = policies.document_of(session.get_one(Policy, job.policy_id))
            return _Waiting(job.id, document, dict(job.hyperparameters), dict(_files(session, job)))

    def _check(self, waiting: _Waiting) -> _Fault | None:
        limits = waiting.document.limits
        try:
            settle(waiting.document, waiting.wishes)
        except RefusalError as error:
            return _Fault(error.param, str(error), "invalid_hyperparameters")
        for param, (key, file_id) in waiting.files.items():
            if key is None:
                return _Fault(param, f"{file_id} was deleted before the job had read it", "file_deleted")
            with tempfile.TemporaryDirectory(dir=self._scratch.path) as folder:
                path = Path(folder) / "rows.jsonl"
                try:
                    self._blobs.fetch(key, path)
                    found = validate_chat(path)
                except DataError as error:
                    return _Fault(param, _explain(file_id, error.problems, error.total))
                except StoreAwayError:
                    raise
                except HoldtrueError as error:
                    return _Fault(param, f"{file_id}: {str(error).replace(str(path), 'the file')}")
            if found.bytes > limits.max_bytes:
                return _Fault(param, f"{file_id} has {found.bytes} bytes, and {limits.max_bytes} are allowed")
            least = limits.min_rows if param == "training_file" else 1
            if not least <= found.rows <= limits.max_rows:
                return _Fault(
                    param, f"{file_id} has {found.rows} rows, and between {least} and {limits.max_rows} are allowed"
                )
        return None


def _files(session: Session, job: Job) -> Iterator[tuple[str, tuple[str | None, str]]]:
    for param in ("training_file", "validation_file"):
        file_id = getattr(job, param)
        if file_id is not None:
            yield param, (session.scalar(select(File.blob).where(File.id == file_id)), file_id)


def _explain(file_id: str, problems: tuple[Problem, ...], total: int) -> str:
    shown = "; ".join(
        (f"line {each.line}, " if each.line else "") + f"{each.field}: {each.message}"
        if each.field
        else f"line {each.line}: {each.message}"
        for each in problems[:_SHOWN]
    )
    more = f"; and {total - _SHOWN} more" if total > _SHOWN else ""
    least = "at least " if total > len(problems) else ""  # a row after those that are listed counts once
    return f"{file_id} has {least}{total} fault{'s' * (total != 1)}: {shown}{more}"
