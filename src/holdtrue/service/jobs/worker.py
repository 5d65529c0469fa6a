"""Takes a job, runs it under its policy, and publishes what came of it; may die at any moment."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import threading
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from sqlalchemy import select

from holdtrue.errors import (
    DataError,
    HoldtrueError,
    Interrupted,
    NeedError,
    OutcomeError,
    RunError,
    ScreenError,
    SpecError,
)
from holdtrue.models.digest import file_digest
from holdtrue.runs import Control, Run, RunSpec, execute
from holdtrue.runs import files as run_files
from holdtrue.service import clock, quotas
from holdtrue.service.evidence import signing
from holdtrue.service.jobs import events, leases, lifecycle, snapshot
from holdtrue.service.jobs.holding import Held
from holdtrue.service.jobs.keeping import EPOCHS, Keeper
from holdtrue.service.jobs.leases import Lease, LeaseLostError
from holdtrue.service.jobs.progress import Reporter
from holdtrue.service.jobs.publish import Judged, action_after, publish
from holdtrue.service.jobs.tracking import Tracker, TrackingError
from holdtrue.service.policy import JobRequest, PolicyDocument, RefusalError, resolve
from holdtrue.service.policy import store as policies
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.away import is_store_away
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database, trouble
from holdtrue.service.store.schema import ENDED, File, Job, JobState, Model, Policy, Project

log = structlog.get_logger()
IDLE_SECONDS = 1.0
FAILED_SECONDS = 5.0
_DATABASE_AWAY = "The service's database does not answer; the job goes on when it does"
_PATH = re.compile(r"(?<![\w.])(?:/[\w.@+-]+)+/([\w.@+-]+)")


class _Plan(NamedTuple):
    """What of a job the worker needs; read once, at the start of a lease."""

    document: PolicyDocument
    files: dict[str, tuple[str | None, str]]  # the job's field -> the blob's key and its SHA-256
    parent: tuple[str, str] | None  # an adapter's place and digest
    hyperparameters: dict[str, Any]
    seed: int
    attempt: int
    state: tuple[str | None, str] | None
    wandb: dict[str, Any] | None


class Worker:
    """Works on one job at a time."""

    def __init__(self, settings: ServiceSettings, *, db: Database | None = None, blobs: Blobs | None = None) -> None:
        self._settings = settings
        self._db = db or Database(settings.database)
        self._blobs = blobs or Blobs(settings.blobs)
        self._work = settings.home.absolute() / "work"
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._signer = signing.signer_of(settings)
        self._waits: dict[str, int] = {}  # how often each job was set aside here

    def run(self, stop: threading.Event) -> None:
        """Take jobs until told to stop; a job in hand is then saved and given back."""
        self._set_threads()
        while not stop.is_set():
            try:
                busy = self.work_one(stop)
            except Exception:
                log.exception("worker failed", worker=self._owner)
                stop.wait(FAILED_SECONDS)
                continue
            if not busy:
                stop.wait(IDLE_SECONDS)

    def work_one(self, stop: threading.Event | None = None) -> bool:
        """Take a job and work on it to its end, or as far as it goes; say whether there was one."""
        self._clean()
        stop = stop or threading.Event()
        lease = leases.take(self._db, self._owner, self._settings.lease_seconds)
        if lease is None:
            return False
        bound = log.bind(job=lease.job_id, fence=lease.fence, worker=self._owner)
        bound.info("took job")
        held = Held(lease, stop)
        try:
            with held:
                action = self._train(lease, held)
            bound.info("job done", action=action)
            self._waits.pop(lease.job_id, None)
        except (LeaseLostError, Interrupted) as error:
            self._stopped(lease, held, error, stop)
        except Exception as error:
            self._failed(lease, error, stop)
        return True

    # One job

    def _train(self, lease: Lease, held: Held) -> str:
        folder = self._work / lease.job_id / str(lease.fence)
        folder.mkdir(parents=True)
        plan = self._plan(lease)
        request = self._fetch(plan, folder)
        while True:
            spec = resolve(plan.document, request, plan.attempt)
            final, checkpoints = self._judge(lease, held, plan, spec, folder)
            action = publish(lease, final, checkpoints, plan.document, self._blobs, self._signer)
            if action != "retrain":
                return action
            plan = plan._replace(attempt=plan.attempt + 1, state=None)

    def _judge(self, lease: Lease, held: Held, plan: _Plan, spec: RunSpec, folder: Path) -> tuple[Judged, list[Judged]]:
        place = folder / f"attempt-{plan.attempt}"
        if plan.state is not None:
            keys = [key for key in plan.state if key is not None]
            run = snapshot.restore(keys, place, spec, self._blobs)
        else:
            run = Run.create(place, spec)
        keeper = Keeper(
            run, lease, self._blobs, attempt=plan.attempt, rows=None if plan.state is None else plan.state[0]
        )
        tracker = _tracker(lease, plan, folder)
        with (
            contextlib.closing(tracker) if tracker else contextlib.nullcontext(),
            Reporter(run, lease, plan.attempt, keeper, tracker) as reporter,
        ):
            control = Control(progress=reporter.tell, stop=held.stop)
            try:
                if plan.attempt == 0 and execute(run, control, until="prepare"):
                    self._check_tokens(lease, run)
                execute(run, control)
                keeper.save()
                final = Judged(run, plan.attempt)
                wanted = action_after(plan.document, str(final.gate["outcome"]), plan.attempt) == "release"
                if not (wanted and plan.document.checkpoints):
                    return final, []
                return final, [self._checkpoint(run, step, plan.attempt, held) for step in keeper.steps()]
            except Interrupted:
                if not held.lost:
                    keeper.save()
                raise

    def _check_tokens(self, lease: Lease, run: Run) -> None:
        """Refuse a job that would train more than its project has left today, now that its rows are counted."""
        kinds = run.manifest["data"]["train"]["by_kind"]
        each = sum(count["tokens"] for kind, count in kinds.items() if kind != "aside")
        with self._db.read() as session:
            job = session.scalars(select(Job).where(Job.id == lease.job_id)).one()
            limits = self._settings.limits.with_overrides(session.get_one(Project, job.project_id).limits)
            tokens = each * run.spec.training.epochs
            quotas.check_training(session, job.project_id, limits, tokens, now=clock.now())

    def _checkpoint(self, run: Run, step: int, attempt: int, held: Held) -> Judged:
        """Put an earlier checkpoint through the weights hook and a gate of its own, as a run that ended there."""
        place = run.path.with_name(f"{run.path.name}-step-{step}")
        if not (place / "spec.json").exists():

            def copy(target: Path) -> None:
                for name in ("spec.json", "manifest.json", "metrics.jsonl"):
                    shutil.copy2(run.path / name, target / name)
                shutil.copytree(run.path / EPOCHS / str(step), target / "adapter_raw")
                (target / "stages").mkdir()
                for stage in run.stages_until("train"):
                    shutil.copy2(run.path / "stages" / f"{stage}.json", target / "stages")

            run_files.replace_folder(place, copy)
        earlier = Run(place)
        execute(earlier, Control(stop=held.stop))
        return Judged(earlier, attempt, step)

    # What a job needs

    def _plan(self, lease: Lease) -> _Plan:
        with self._db.read() as session:
            job = session.scalars(select(Job).where(Job.id == lease.job_id)).one()
            found: dict[str, tuple[str | None, str]] = {}
            for param in ("training_file", "validation_file"):
                file_id = getattr(job, param)
                if file_id is not None:
                    row = session.scalars(select(File).where(File.id == file_id)).one()
                    found[param] = (row.blob, row.sha256)
            parent = None
            if job.parent_model_id is not None:
                model = session.scalars(select(Model).where(Model.id == job.parent_model_id)).one()
                if model.status != "ready" or model.adapter is None or model.adapter_digest is None:
                    raise _CustomerError("model", f"{job.model} is no longer there to go on from", "model_not_found")
                parent = (model.adapter, model.adapter_digest)
            state = session.get(JobState, (job.id, job.attempt))
            return _Plan(
                policies.document_of(session.get_one(Policy, job.policy_id)),
                found,
                parent,
                dict(job.hyperparameters),
                job.seed,
                job.attempt,
                None if state is None else (state.rows, state.rest),
                (job.integrations or {}).get("wandb"),
            )

    def _fetch(self, plan: _Plan, folder: Path) -> JobRequest:
        paths: dict[str, Path] = {}
        for param, (key, sha256) in plan.files.items():
            if key is None:
                raise _CustomerError(param, "the file was deleted before the job had ended", "file_deleted")
            paths[param] = folder / f"{param}.jsonl"
            self._blobs.fetch(key, paths[param])
            if file_digest(paths[param]) != sha256:
                raise RunError(f"the stored {param} is not what was uploaded")
        parent = None
        if plan.parent is not None:
            parent = folder / "parent"
            key, digest = plan.parent
            self._blobs.fetch_tree(key, parent, digest)
        return JobRequest(
            training=paths["training_file"],
            validation=paths.get("validation_file"),
            hyperparameters=plan.hyperparameters,
            seed=plan.seed,
            parent=parent,
            folder=folder,
        )

    # When it does not end as it should

    def _stopped(self, lease: Lease, held: Held, error: HoldtrueError, stop: threading.Event) -> None:
        if held.away:
            self._set_aside(lease, _DATABASE_AWAY, stop)
        elif held.lost or isinstance(error, LeaseLostError):
            log.warning("lost job", job=lease.job_id, fence=lease.fence)
        elif held.pausing:
            with contextlib.suppress(LeaseLostError), lease.write() as (session, job):
                job.tries -= 1
                if job.wanted == "pause":
                    lifecycle.move(session, job, "paused", "The job is paused")
                else:
                    lifecycle.move(session, job, "queued", "The job goes on")
        else:
            lease.release()

    def _failed(self, lease: Lease, error: Exception, stop: threading.Event) -> None:
        log.error("job failed", job=lease.job_id, error=type(error).__name__, exc_info=True)
        reason = _waits_for(error)
        if reason is not None:
            self._set_aside(lease, reason, stop)
            return
        told = _told(error)
        with contextlib.suppress(LeaseLostError), lease.write() as (session, job):
            if told is None:
                lifecycle.move(session, job, "queued", "A worker failed; the job is tried again", level="warn")
                if job.tries > 1:  # not at once again and again: what is short, such as memory, needs time
                    wait = min(FAILED_SECONDS * 2 ** (job.tries - 2), leases.LONGEST_WAIT)
                    job.lease_until = clock.shared(session) + wait
            else:
                text = f"The job failed: {told['message']}"
                lifecycle.move(session, job, "failed", text, error=told, level="error")

    def _set_aside(self, lease: Lease, reason: str, stop: threading.Event) -> None:
        """Give a job back that nothing is wrong with, and leave it alone for longer each time.

        Where the database is what keeps it, that waits until the database is back: a lease that ran out costs a try.
        """
        times = self._waits.get(lease.job_id, 0)
        self._waits[lease.job_id] = times + 1
        given_back = False
        while not given_back:
            try:
                lease.release(reason, after=FAILED_SECONDS * 2 ** min(times, 10))
                given_back = True
            except Exception as error:
                if trouble(error) is None:
                    raise
                log.warning("cannot give back", job=lease.job_id, error=type(error).__name__)
            if stop.wait(FAILED_SECONDS):  # what keeps this job may keep the next one as well
                return

    def _clean(self) -> None:
        """Delete what ended jobs, and lost leases of this process, left on this host."""
        if not self._work.is_dir():
            return
        names = [path.name for path in self._work.iterdir()]
        with self._db.read() as session:
            rows = session.execute(select(Job.id, Job.lease_owner).where(Job.id.in_(names), Job.status.not_in(ENDED)))
            open_jobs = {row.id: row.lease_owner for row in rows}
        for name in names:
            owner = open_jobs.get(name)
            if name not in open_jobs or owner is None or owner == self._owner:
                shutil.rmtree(self._work / name, ignore_errors=True)

    def _set_threads(self) -> None:
        if self._settings.threads:
            import torch

            torch.set_num_threads(self._settings.threads)


def _tracker(lease: Lease, plan: _Plan, folder: Path) -> Tracker | None:
    if plan.wandb is None:
        return None
    try:
        return Tracker(plan.wandb, f"{lease.job_id}-{plan.attempt}", folder / "wandb")
    except TrackingError as error:
        with lease.write() as (session, job):
            events.add(session, job, str(error), level="warn", once="wandb")
        return None


def _waits_for(error: Exception) -> str | None:
    """Return what to say of an error that passes while the job waits; ``None`` for any other."""
    found = trouble(error)
    if run_files.is_disk_full(error) or found == "full":
        return "The service's storage is full; the job goes on when there is room"
    if is_store_away(error):
        return "The service's object store cannot be reached; the job goes on when it can"
    if found == "away":
        return _DATABASE_AWAY
    if isinstance(error, policies.PolicyUnreadableError):
        return "The policy that the job began with cannot be read by this version of the service; the job waits"
    return None


class _CustomerError(OutcomeError):
    def __init__(self, param: str, message: str, code: str) -> None:
        self.param, self.code = param, code
        super().__init__(message)


def _told(error: Exception) -> dict[str, Any] | None:
    """Return what to tell a customer of an error, without places on this host; ``None`` where trying again may help."""
    message = _PATH.sub(r"\1", str(error))[:2000]
    if isinstance(error, _CustomerError):
        return {"code": error.code, "message": message, "param": error.param}
    if isinstance(error, quotas.QuotaError):
        return {"code": error.code, "message": message, "param": "training_file"}
    if isinstance(error, RefusalError):
        return {"code": "invalid_hyperparameters", "message": message, "param": error.param}
    if isinstance(error, DataError):
        return {"code": "invalid_training_file", "message": message, "param": "training_file"}
    if isinstance(error, ScreenError):
        found = "; ".join(error.exceeded)
        text = (
            f"the screen of the training file found what the provider's policy does not allow: {found}. "
            "Nothing was trained: look through the file's answers, or ask the provider"
        )
        return {"code": "screening", "message": text, "param": "training_file"}
    if isinstance(error, NeedError | SpecError):
        text = "the provider's policy cannot be carried out on this job: " + message
        return {"code": "policy_error", "message": text, "param": None}
    if isinstance(error, OutcomeError):  # other ``RunError``s are of a host: a model that does not fit, a damaged file
        return {"code": "training_error", "message": message, "param": None}
    return None
