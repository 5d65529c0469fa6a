"""Jobs by their metadata: what a query asks for, and a page of the jobs that have it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session, aliased
from starlette.datastructures import QueryParams

from holdtrue.service.api import schemas
from holdtrue.service.api.errors import ApiError, invalid
from holdtrue.service.api.pages import Slice, position
from holdtrue.service.store.schema import Job, JobMetadata

MOST_FILTERS = 16
LOOKED_AT = 500
"""Jobs that a page looks at, at most, for several pairs at once: no index has what they have in common."""
QUERY = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "`metadata[key]=value` selects jobs with that pair; `metadata=null` those without any.",
            "schema": {
                "type": "object",
                "additionalProperties": {"type": "string", "maxLength": 512},
                "maxProperties": MOST_FILTERS,
            },
        }
    ]
}
_FILTER = re.compile(r"metadata\[([^\[\]]{1,64})\]")
_Conditions = tuple[ColumnElement[bool], ...]


class Filter(NamedTuple):
    """What a query asks of metadata: pairs that a job must have, or that it has none at all."""

    pairs: Mapping[str, str]
    none: bool


def read(query: QueryParams) -> Filter:
    """Return what a query asks for; ``ApiError`` where it is not put as it must be."""
    pairs: dict[str, str] = {}
    none = False
    for name, value in query.multi_items():
        if name == "metadata":
            if value not in ("null", "", "{}"):
                raise invalid("metadata must be metadata[key]=value, or metadata=null", "metadata")
            none = value == "null"
        elif name.startswith("metadata["):
            match = _FILTER.fullmatch(name)
            if match is None or len(value) > 512 or match[1] in pairs or len(pairs) == MOST_FILTERS:
                raise invalid("metadata filters are metadata[key]=value, each key once, at most 16", "metadata")
            pairs[match[1]] = value
    if none and pairs:
        raise invalid("metadata=null and metadata[key]=value exclude each other", "metadata")
    return Filter({schemas.plain_query(key): schemas.plain_query(value) for key, value in pairs.items()}, none)


def take(session: Session, project_id: str, pairs: Mapping[str, str], *, after: str | None, limit: int) -> Slice:
    """Return a page of a project's jobs that have all of some pairs, the newest first.

    An index has the jobs with one pair. Of several, the pair with the fewest jobs is gone through, and each of its jobs
    asked for the others, ``LOOKED_AT`` at most: a page may be short of its limit though there is more.

    Raises:
        ApiError: there is no such cursor, or none of the jobs that were looked at has all pairs.
    """
    before = position(session, Job, after, owned=Job.project_id == project_id)
    key, floor = _rarest(session, project_id, pairs, before)
    walked = _having(project_id, key, pairs[key], before)
    walked += () if floor is None else (JobMetadata.seq > floor,)
    others = [_has(*pair) for pair in pairs.items() if pair[0] != key]
    query = select(JobMetadata.seq).where(*walked, *others).order_by(JobMetadata.seq.desc())
    found = session.scalars(query.limit(limit + 1)).all()
    if not found and floor is not None:
        raise _too_common(session, walked)
    return Slice(_jobs(session, project_id, found[:limit]), len(found) > limit or floor is not None)


def _having(project_id: str, key: str, value: str, before: int | None) -> _Conditions:
    have = (JobMetadata.project_id == project_id, JobMetadata.key == key, JobMetadata.value == value)
    return have if before is None else (*have, JobMetadata.seq < before)


def _has(key: str, value: str) -> ColumnElement[bool]:
    """Whether a row's job has another pair: a lookup by key, which no planner makes into a join of all jobs."""
    other = aliased(JobMetadata)
    found = select(other.value).where(other.job_id == JobMetadata.job_id, other.key == key)
    return found.scalar_subquery() == value


def _rarest(session: Session, project_id: str, pairs: Mapping[str, str], before: int | None) -> tuple[str, int | None]:
    """Return the pair to go through by its key, and the place to go down to: ``None`` is to the end."""
    if len(pairs) == 1:
        return next(iter(pairs)), None
    floors: dict[str, int] = {}
    for key, value in pairs.items():
        query = select(JobMetadata.seq).where(*_having(project_id, key, value, before))
        floor = session.scalar(query.order_by(JobMetadata.seq.desc()).offset(LOOKED_AT).limit(1))
        if floor is None:
            return key, None
        floors[key] = floor
    key = min(floors, key=lambda each: floors[each])
    return key, floors[key]


def _too_common(session: Session, walked: _Conditions) -> ApiError:
    last = session.scalar(select(JobMetadata.job_id).where(*walked).order_by(JobMetadata.seq).limit(1))
    return invalid(
        f"{LOOKED_AT} jobs were looked at, and none has all of these pairs. Ask again with after={last} to look at the "
        "next ones, or for a pair that fewer jobs have",
        "metadata",
        "metadata_too_common",
    )


def _jobs(session: Session, project_id: str, seqs: Sequence[int]) -> list[Any]:
    query = select(Job).where(Job.seq.in_(seqs), Job.project_id == project_id)
    rows = {row.seq: row for row in session.scalars(query)} if seqs else {}
    return [rows[seq] for seq in seqs]


def of_jobs(session: Session, job_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return jobs' metadata by their ids, sorted by key."""
    found: dict[str, dict[str, str]] = {job_id: {} for job_id in job_ids}
    if job_ids:
        for row in session.scalars(select(JobMetadata).where(JobMetadata.job_id.in_(job_ids))):
            found[row.job_id][row.key] = row.value
    return {job_id: dict(sorted(pairs.items())) for job_id, pairs in found.items()}
