"""A job's curves: what its metrics events say of loss and KL, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from holdtrue.service.store.schema import Job, JobEvent

MOST_EVENTS = 20_000
MOST_POINTS = 300
"""Rows of the table that a page carries; more are thinned evenly."""
_LOSS = ("train_loss", "loss", "ce")
_VALIDATION = ("valid_loss", "full_valid_loss", "eval_loss")
_KL = ("kl", "train_kl")


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
    data = event.data
    if event.type != "metrics" or not isinstance(data, dict):
        return None
    step, attempt = data.get("step"), data.get("attempt", 0)
    if isinstance(step, bool) or not isinstance(step, int) or not isinstance(attempt, int):
        return None
    found = Point(attempt, step, _first(data, _LOSS), _first(data, _VALIDATION), _first(data, _KL))
    return found if (found.loss, found.validation, found.kl) != (None, None, None) else None


def _first(data: dict[str, Any], names: Sequence[str]) -> float | None:
    for name in names:
        value = data.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def curves(session: Session, job: Job) -> list[Point]:
    """Return the points of a job's last training in the order of their steps, thinned to ``MOST_POINTS``."""
    query = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.type == "metrics")
    newest = session.scalars(query.order_by(JobEvent.seq.desc()).limit(MOST_EVENTS)).all()
    by_step: dict[int, Point] = {}
    last: int | None = None
    for event in reversed(newest):
        point = point_of(event)
        if point is None:
            continue
        if last is not None and point.attempt != last:
            by_step.clear()
        last = point.attempt
        before = by_step.get(point.step)
        by_step[point.step] = point if before is None else _both(before, point)
    return thin([by_step[step] for step in sorted(by_step)])


def _both(one: Point, two: Point) -> Point:
    """Return a point of two events on one step: training and validation may come apart."""
    names = ("loss", "validation", "kl")
    later = {name: getattr(two, name) if getattr(two, name) is not None else getattr(one, name) for name in names}
    return Point(two.attempt, two.step, **later)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most ``most`` points at even distances, the last one always, and every one with a validation loss."""
    if len(points) <= most:
        return list(points)
    every = math.ceil(len(points) / most)
    last = len(points) - 1
    return [
        point
        for index, point in enumerate(points)
        if (last - index) % every == 0 or (point.validation is not None and len(points) < 10 * most)
    ]
