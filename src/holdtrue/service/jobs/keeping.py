"""What a worker keeps of a run while it works on it, so that another can go on: its state, and the ends of epochs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select

from holdtrue.runs import Run
from holdtrue.runs import files as run_files
from holdtrue.service import clock, ids
from holdtrue.service.jobs import events, snapshot
from holdtrue.service.jobs.leases import Lease
from holdtrue.service.jobs.progress import held_out
from holdtrue.service.jobs.publish import model_name
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.schema import Job, JobCheckpoint, JobState

EPOCHS = "epochs"
"""The folder of a run in which the adapters of epochs' ends are kept, by step."""


class Keeper:
    """Keeps a run's state in the object store, and its epochs' adapters in the run.

    ``rows`` is the place of its prepared rows, where an earlier holder of the job has kept them.
    """

    SECONDS = 60.0

    def __init__(self, run: Run, lease: Lease, blobs: Blobs, *, attempt: int, rows: str | None) -> None:
        self._run, self._lease, self._blobs, self._attempt, self._rows = run, lease, blobs, attempt, rows
        self._saved_at, self._saw, self._furthest = time.monotonic(), self._mark(), self._reached()

    def due(self, stage: str) -> bool:
        """Say whether there is what is worth saving: a stage's end, a checkpoint, a minute of work on what has none."""
        minute = stage != "train" and time.monotonic() - self._saved_at >= self.SECONDS
        return minute or self._mark() != self._saw

    def save(self) -> None:
        """Save the run as it is now."""
        self._keep_epochs()
        if self._rows is None and self._run.is_done("prepare"):
            self._rows = snapshot.save_rows(self._run, self._blobs)
        reached = self._reached()
        rest = snapshot.save_rest(self._run, self._blobs)
        with self._lease.write() as (session, job):
            key = (job.id, self._attempt)
            state = session.get(JobState, key)
            before = None if state is None else state.rest
            if state is None:
                state = JobState(job_id=key[0], attempt=key[1])
                session.add(state)
            state.rows, state.rest, state.saved_at = self._rows, rest, clock.now()
            for step, metrics in self._epoch_metrics().items():
                _checkpoint_row(session, job, self._attempt, step, metrics)
            if reached > self._furthest:
                job.tries = 1  # this lease: what killed the ones before is past
        if before is not None:
            self._blobs.delete(before)
        self._furthest = max(self._furthest, reached)
        self._saved_at, self._saw = time.monotonic(), self._mark()

    def steps(self) -> list[int]:
        """Return the steps of the kept adapters before the last one."""
        folder = self._run.path / EPOCHS
        found = sorted(int(path.name) for path in folder.iterdir()) if folder.is_dir() else []
        last = self._last()
        return [step for step in found if last is None or step < last]

    def _last(self) -> int | None:
        return (self._run.marker("train") or {}).get("report", {}).get("steps")

    def _mark(self) -> tuple[list[str], list[int]]:
        """Return the stages that are done and the steps of whole checkpoints, in order."""
        done = [path.name for path in (self._run.path / "stages").glob("*.json")]
        sealed = self._run.checkpoints.glob("checkpoint-*/holdtrue_seal.json")
        return sorted(done), sorted(int(path.parent.name.rpartition("-")[2]) for path in sealed)

    def _reached(self) -> tuple[int, int, int]:
        """Return how far the run has come: stages done, the last whole checkpoint, bytes of what was measured."""
        done, sealed = self._mark()
        measured = (self._run.path / "evaluations").rglob("[!.]*.json*")
        return len(done), sealed[-1] if sealed else 0, sum(path.stat().st_size for path in measured)

    def _keep_epochs(self) -> None:
        """Copy out the adapters of checkpoints at which an epoch ended; the run itself keeps the last two alone."""
        epochs = {int(m["step"]): m["epoch"] for m in self._run.metrics() if "loss" in m and "epoch" in m}
        for step, epoch in epochs.items():
            source, target = self._run.checkpoints / f"checkpoint-{step}", self._run.path / EPOCHS / str(step)
            ended = abs(epoch - round(epoch)) < 1e-9
            if ended and (source / "holdtrue_seal.json").is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                run_files.replace_folder(target, lambda to, source=source: _copy_adapter(source, to))

    def _epoch_metrics(self) -> dict[int, dict[str, Any]]:
        found = {}
        last = self._last()
        wanted = {*self.steps(), *([last] if last else [])}
        for metrics in self._run.metrics():
            if metrics["step"] in wanted and "loss" in metrics:
                found[metrics["step"]] = {
                    "step": metrics["step"],
                    "train_loss": metrics["loss"],
                    "train_mean_token_accuracy": metrics.get("accuracy"),
                }
            if metrics["step"] in found and "eval_loss" in metrics:
                found[metrics["step"]] |= held_out(metrics)
        return found


def _copy_adapter(source: Path, target: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy2(source / name, target / name)


def _checkpoint_row(session: Any, job: Job, attempt: int, step: int, metrics: Mapping[str, Any]) -> None:
    place = (JobCheckpoint.job_id == job.id, JobCheckpoint.attempt == attempt, JobCheckpoint.step_number == step)
    if session.scalar(select(JobCheckpoint.id).where(*place)) is None:
        name = f"{model_name(session, job)}:ckpt-step-{step}"
        session.add(
            JobCheckpoint(
                id=ids.new("ftckpt"),
                job_id=job.id,
                attempt=attempt,
                step_number=step,
                name=name,
                metrics=dict(metrics),
                model_id=None,
                created_at=clock.now(),
            )
        )
        events.add(session, job, f"Checkpoint created at step {step}", once=f"checkpoint:{attempt}:{step}")
