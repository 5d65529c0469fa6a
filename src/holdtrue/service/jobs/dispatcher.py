"""Validates the files of new jobs, and removes for good what is to be removed. Any number of dispatchers may run."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from holdtrue.data import validate_chat
from holdtrue.errors import DataError, HoldtrueError, Problem
from holdtrue.service import clock
from holdtrue.service.jobs import lifecycle
from holdtrue.service.policy import PolicyDocument, RefusalError, settle
from holdtrue.service.policy import store as policies
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import retention
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import File, Job, Policy

log = structlog.get_logger()
IDLE_SECONDS = 0.5
SWEEP_SECONDS = 60.0
ORPHAN_SECONDS = 4 * 3600.0
"""Between two looks through the whole object store, which takes a list of all of it."""
_SHOWN = 10


@dataclass(frozen=True)
class _Fault:
    param: str
    message: str
    code: str = "invalid_file"


class _Waiting(NamedTuple):
    job_id: str
    document: PolicyDocument
    wishes: dict[str, int | float | str]
    files: dict[str, tuple[str | None, str]]  # param -> the blob's key and the file's id


class Dispatcher:
    """Looks for work twice a second."""

    def __init__(self, settings: ServiceSettings, *, db: Database | None = None, blobs: Blobs | None = None) -> None:
        self._settings = settings
        self._db = db or Database(settings.database)
        self._blobs = blobs or Blobs(settings.blobs)
        self._looked = float("-inf")

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop; what fails unforeseen is logged and tried again."""
        swept = float("-inf")
        while not stop.is_set():
            try:
                busy = self.validate_one()
                if clock.now() - swept >= SWEEP_SECONDS:
                    self.sweep()
                    swept = clock.now()
            except Exception:
                log.exception("dispatcher failed")
                busy = False
            if not busy:
                stop.wait(IDLE_SECONDS)

    def sweep(self) -> None:
        """Remove what has expired."""
        now = clock.now()
        due = now - self._looked >= ORPHAN_SECONDS
        found = retention.sweep(self._db, self._blobs, now, self._settings, orphans=due)
        self._looked = now if due else self._looked
        if any(found):
            log.info("removed what had expired", **found._asdict())

    def validate_one(self) -> bool:
        """Validate the files of the oldest new job and queue it, or fail it; say whether there was one."""
        waiting = self._oldest()
        if waiting is None:
            return False
        fault = self._check(waiting)
        with self._db.write() as session:
            job = session.scalar(select(Job).where(Job.id == waiting.job_id).with_for_update())
            if job is None or job.status != "validating_files":
                return True  # another dispatcher was faster, or the job was cancelled or paused meanwhile
            if fault is None:
                job.resolved = dict(settle(waiting.document, job.hyperparameters))
                lifecycle.move(session, job, "queued", "Files validated, moving job to queued state")
            else:
                error = {"code": fault.code, "message": fault.message, "param": fault.param}
                lifecycle.move(session, job, "failed", "The job failed: " + fault.message, error=error, level="error")
        log.info("validated", job=waiting.job_id, valid=fault is None)
        return True

    def _oldest(self) -> _Waiting | None:
        with self._db.read() as session:
            job = session.scalars(
                select(Job).where(Job.status == "validating_files").order_by(Job.seq).limit(1)
            ).first()
            if job is None:
                return None
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
            with tempfile.TemporaryDirectory(prefix="holdtrue-") as folder:
                path = Path(folder) / "rows.jsonl"
                try:
                    self._blobs.fetch(key, path)
                    found = validate_chat(path)
                except DataError as error:
                    return _Fault(param, _explain(file_id, error.problems, error.total))
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
    return f"{file_id} has {total} fault{'s' * (total != 1)}: {shown}{more}"
