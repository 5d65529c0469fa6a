"""A job's curves: what its metrics events say of loss and KL, step by step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from holdtrue.service.store.schema import Job, JobCheckpoint, JobEvent

MOST_EVENTS = 2000
"""Steps that are read of a job; of more, some at even distances."""
MOST_POINTS = 300
"""Rows of the table that a page carries; more are thinned evenly."""
_ATTEMPT = re.compile(r"(?:step|eval):(\d+):\d+")


@dataclass(frozen=True)
class Point:
    """What was measured at a step, in nats a token; ``None`` where it was not.

    Attributes:
        attempt: 0 for the first training; later ones begin at step 1 again.
        step: optimizer step.
        loss: of the training rows.
        validation: loss of the held-out rows.
        kl: to the reference.
    """

    attempt: int
    step: int
    loss: float | None
    validation: float | None
    kl: float | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, under the attributes' names."""
        return dict(vars(self))


def point_of(event: JobEvent) -> Point | None:
    """Return what a metrics event measured; ``None`` for any other event, and for one without a step."""
    data, told = event.data, _ATTEMPT.fullmatch(event.once or "")
    if event.type != "metrics" or not isinstance(data, dict):
        return None
    step = data.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        return None
    attempt = int(told[1]) if told else 0
    return Point(attempt, step, _number(data, "train_loss"), _held_out(data), _number(data, "kl"))


def _number(data: dict[str, Any], name: str) -> float | None:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _held_out(data: dict[str, Any]) -> float | None:
    whole = _number(data, "full_valid_loss")
    return _number(data, "valid_loss") if whole is None else whole


def curves(session: Session, job: Job) -> list[Point]:
    """Return the points of a job's last training in the order of their steps, thinned to ``MOST_POINTS``.

    The loss of held-out rows is taken from the checkpoints too, whose events may have been thinned away.
    """
    points = [point for point in map(point_of, _steps(session, job)) if point is not None]
    attempt = max((point.attempt for point in points), default=0)
    by_step: dict[int, Point] = {}
    for point in points:
        if point.attempt == attempt:
            by_step[point.step] = _merged(by_step.get(point.step), point)
    checkpoints = select(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.attempt == attempt)
    for row in session.scalars(checkpoints):
        held_out = _held_out(row.metrics)
        if held_out is not None:
            point = by_step.get(row.step_number, Point(attempt, row.step_number, None, None, None))
            by_step[row.step_number] = replace(point, validation=held_out)
    return thin([by_step[step] for step in sorted(by_step)])


def _merged(first: Point | None, second: Point) -> Point:
    if first is None:
        return second
    told = {name: value for name, value in vars(second).items() if value is not None}
    return replace(first, **told)


def _steps(session: Session, job: Job) -> Sequence[JobEvent]:
    own = (JobEvent.job_id == job.id, JobEvent.type == "metrics")
    count = session.scalar(select(func.count(JobEvent.seq)).where(*own)) or 0
    every = max(1, math.ceil(count / MOST_EVENTS))
    place = func.row_number().over(order_by=JobEvent.seq.desc()).label("place")
    numbered = select(JobEvent.seq, place).where(*own).subquery()
    chosen = select(numbered.c.seq).where((numbered.c.place - 1) % every == 0)
    return session.scalars(select(JobEvent).where(JobEvent.seq.in_(chosen)).order_by(JobEvent.seq)).all()


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most ``most`` points at even distances, the last one always, and besides all with a held-out loss."""
    every = max(1, math.ceil(len(points) / most))
    last = len(points) - 1
    return [point for index, point in enumerate(points) if (last - index) % every == 0 or point.validation is not None]
