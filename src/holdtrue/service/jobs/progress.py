"""Turns what a run tells of itself into events of its job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any, Protocol

from holdtrue.errors import Interrupted
from holdtrue.runs import Run
from holdtrue.service import clock, quotas
from holdtrue.service.jobs import events
from holdtrue.service.jobs.leases import Lease, LeaseLostError
from holdtrue.service.jobs.tracking import Tracker

FLUSH_SECONDS = 0.5
_STAGES = {
    "screen": "Screening the training file",
    "prepare": "Preparing the training file",
    "train": "Training has begun",
    "finalise": "Applying the defenses' last step to the weights",
    "evaluate": "Measuring the model",
    "gate": "Running the safety checks",
}


class Keeper(Protocol):
    """Keeps a run's state."""

    def due(self, stage: str) -> bool:
        """Say whether a run in that stage is worth saving."""
        ...

    def save(self) -> None:
        """Save it."""


class Reporter:
    """Writes a run's stages, steps and validations as events, several in one transaction where they come fast."""

    def __init__(self, run: Run, lease: Lease, attempt: int, keeper: Keeper, tracker: Tracker | None = None) -> None:
        self._run, self._lease, self._attempt, self._keeper, self._tracker = run, lease, attempt, keeper, tracker
        self._stage: str | None = None
        self._waiting: list[dict[str, Any]] = []
        self._tokens: dict[int, float] = {each["step"]: each["tokens"] for each in run.metrics() if "tokens" in each}
        self._flushed = time.monotonic()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Interrupted):
            with contextlib.suppress(LeaseLostError):
                self._flush()

    def tell(self, fields: dict[str, Any]) -> None:
        """Take what a run tells; ``LeaseLostError`` where the job is no longer this worker's."""
        stage = str(fields["stage"])
        if stage != self._stage:
            self._flush()
            self._begin(stage)
        # First the steps, then the state that makes them past: a step that nobody trains again must have been told.
        if self._keeper.due(stage):
            self._flush()
            self._keeper.save()
        if "loss" in fields:
            self._tokens[fields["step"]] = fields["tokens"]
        if "loss" in fields or "eval_loss" in fields:
            self._waiting.append(fields)
            if time.monotonic() - self._flushed >= FLUSH_SECONDS or fields["step"] == fields["steps"]:
                self._flush()

    def _begin(self, stage: str) -> None:
        self._stage = stage
        with self._lease.write() as (session, job):
            job.stage = stage
            text = _STAGES.get(stage, stage)
            events.add(session, job, text, data={"stage": stage}, once=f"stage:{self._attempt}:{stage}")

    def _flush(self) -> None:
        if not self._waiting:
            return
        with self._lease.write(project=True) as (session, job):
            for fields in self._waiting:
                step, kind = fields["step"], "step" if "loss" in fields else "eval"
                what, loss = ("training", "loss") if kind == "step" else ("validation", "eval_loss")
                events.add(
                    session,
                    job,
                    f"Step {step}/{fields['steps']}: {what} loss={fields[loss]:.2f}",
                    type="metrics",
                    data=_metrics(fields),
                    once=f"{kind}:{self._attempt}:{step}",
                )
            job.estimated_finish = clock.now() + round(self._waiting[-1]["seconds_left"])
            # As it goes: a job that is cancelled at its last step has trained all the same.
            trained = sum(tokens for step, tokens in self._tokens.items() if step <= self._waiting[-1]["step"])
            quotas.charge_training(session, job, int(trained), now=clock.now())
        if self._tracker is not None:
            for fields in self._waiting:
                self._tracker.send(_metrics(fields))
        self._waiting.clear()
        self._flushed = time.monotonic()


def _metrics(fields: dict[str, Any]) -> dict[str, Any]:
    place = {"step": fields["step"], "total_steps": fields["steps"]}
    if "loss" not in fields:
        return place | held_out(fields)
    own = {name: value for name, value in fields.items() if name == "kl" or name.endswith(("_term", "_weight"))}
    adaptive = {name: value for name, value in fields.items() if name.startswith("adaptive_")}
    return {
        **place,
        "train_loss": fields["loss"],
        "train_mean_token_accuracy": fields.get("accuracy"),
        "tokens_per_second": fields.get("tokens_per_second"),
        **own,
        **adaptive,
    }


def held_out(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run measured on the validation file, always the whole of it, under OpenAI's names."""
    loss, accuracy = metrics["eval_loss"], metrics.get("eval_accuracy")
    return {
        "valid_loss": loss,
        "valid_mean_token_accuracy": accuracy,
        "full_valid_loss": loss,
        "full_valid_mean_token_accuracy": accuracy,
    }
