"""A job's page as it happens: server-sent events that stand on the order of the job's own events."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from sqlalchemy import func, select
from starlette.responses import Response, StreamingResponse

from holdtrue.service.api import jobs as api
from holdtrue.service.api.context import Caller, JobsRead, Parts, PartsDep
from holdtrue.service.api.errors import ApiError
from holdtrue.service.store.schema import ENDED, GateDecision, Job, JobEvent
from holdtrue.service.web.curves import point_of
from holdtrue.service.web.pages import HEADERS, when
from holdtrue.service.web.visitor import find

router = APIRouter()
POLL_SECONDS = 1.0
_QUIET_SECONDS = 15.0
_LONGEST_SECONDS = 3600.0
_SESSION_SECONDS = 3.0
"""How long a stream outlives the session that opened it."""
_STREAMS = 100
_STREAMS_OF_ONE = 20
_EVENTS_A_POLL = 500
_open: Counter[str] = Counter()


@router.get("/jobs/{fine_tuning_job_id}/live")
async def live(
    fine_tuning_job_id: str, request: Request, parts: PartsDep, caller: JobsRead, after: int = 0
) -> Response:
    """Stream a job's events behind the number ``after``, and a word whenever its state changes, until it has ended."""
    resumed = request.headers.get("last-event-id", "")
    after = int(resumed) if resumed.isascii() and resumed.isdigit() and len(resumed) < 19 else after
    job_id = await to_thread.run_sync(_job_id, parts, caller, fine_tuning_job_id)
    if _open.total() >= _STREAMS or _open[caller.project_id] >= _STREAMS_OF_ONE:
        raise ApiError(429, "Too many pages are being kept up to date; close some", headers={"retry-after": "30"})
    return StreamingResponse(
        _stream(request, parts, caller, job_id, min(max(after, 0), 2**62)),
        media_type="text/event-stream",
        headers={**HEADERS, "x-accel-buffering": "no"},
    )


def _job_id(parts: Parts, caller: Caller, job_id: str) -> str:
    with parts.db.read() as session:
        return api.get_job(session, caller.project_id, job_id).id


async def _stream(request: Request, parts: Parts, caller: Caller, job_id: str, after: int) -> AsyncIterator[str]:
    _open[caller.project_id] += 1
    try:
        watch = _Watch(job_id, after)
        began = spoke = asked = time.monotonic()
        yield "retry: 3000\n\n"
        while not request.app.state.stopping() and time.monotonic() - began < _LONGEST_SECONDS:
            if time.monotonic() - asked > _SESSION_SECONDS:
                asked = time.monotonic()
                if not await to_thread.run_sync(_still_signed_in, parts, request, caller):
                    return
            lines, ended = await to_thread.run_sync(watch.look, parts)
            for line in lines:
                yield line
            if ended:
                yield "event: end\ndata: {}\n\n"
                return
            if lines:
                spoke = time.monotonic()
            elif time.monotonic() - spoke > _QUIET_SECONDS:
                spoke = time.monotonic()
                yield ": still here\n\n"  # otherwise a proxy would take the stream for dead
            await asyncio.sleep(POLL_SECONDS)
    finally:
        _open[caller.project_id] -= 1
        if _open[caller.project_id] <= 0:
            del _open[caller.project_id]


def _still_signed_in(parts: Parts, request: Request, caller: Caller) -> bool:
    visitor = find(parts, request)
    return visitor is not None and visitor.principal == caller.principal


class _Watch:
    """What of a job was told already."""

    def __init__(self, job_id: str, after: int) -> None:
        self.job_id = job_id
        self.after = after
        self.state: tuple[Any, ...] | None = None

    def look(self, parts: Parts) -> tuple[list[str], bool]:
        """Return the lines to send, and whether the job has ended and all of it is told."""
        with parts.db.read() as session:
            job = session.scalars(select(Job).where(Job.id == self.job_id)).one()
            decided = select(func.count(GateDecision.id), func.count(GateDecision.override))
            decisions = session.execute(decided.where(GateDecision.job_id == job.id)).one()
            state = (job.status, job.stage, job.attempt, job.wanted, job.held, *decisions)
            # A job's events become visible in the order of their numbers: who writes one holds the job's row.
            query = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.seq > self.after)
            events = session.scalars(query.order_by(JobEvent.seq).limit(_EVENTS_A_POLL)).all()
            lines = [_event(row) for row in events]
            self.after = events[-1].seq if events else self.after
            if state != self.state:
                self.state = state
                lines.append(_line("state", {"status": job.status, "stage": job.stage or ""}))
            return lines, job.status in ENDED and len(events) < _EVENTS_A_POLL


def _event(row: JobEvent) -> str:
    point = point_of(row)
    if row.type == "metrics":
        return _line("metrics", point.to_json(), row.seq) if point is not None else _line("quiet", {}, row.seq)
    values = {"level": row.level, "type": row.type, "message": row.message, "at": when(row.created_at)}
    return _line("message", values, row.seq)


def _line(name: str, values: dict[str, Any], seq: int | None = None) -> str:
    # JSON has no line break of its own in it: no text of an event can end a line of the stream.
    number = f"id: {seq}\n" if seq is not None else ""
    return f"event: {name}\n{number}data: {json.dumps(values)}\n\n"
