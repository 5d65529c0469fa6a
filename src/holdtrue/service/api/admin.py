"""/v1/holdtrue: keys, projects, organizations, usage, receipts, the audit log."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import Field, StrictInt
from sqlalchemy import and_, or_, select, true
from sqlalchemy.orm import Session

from holdtrue.service import audit, auth, clock, ids, quotas, tenancy
from holdtrue.service.api import schemas
from holdtrue.service.api.context import (
    Admin,
    Caller,
    JobsRead,
    ModelsRead,
    Parts,
    PartsDep,
    Provider,
    hold_project,
)
from holdtrue.service.api.errors import ApiError, not_found, responses
from holdtrue.service.api.files import page
from holdtrue.service.api.jobs import get_job
from holdtrue.service.api.pages import MOST, After, Limit, take_by_time
from holdtrue.service.evidence import signing
from holdtrue.service.evidence.card import model_card
from holdtrue.service.store.schema import ApiKey, AuditEntry, Job, Model, Organization, Project, Receipt

router = APIRouter(prefix="/v1/holdtrue", tags=["holdtrue"])
_YEARS = 10 * 366 * 86_400
Name = Annotated[schemas.Plain, Field(min_length=1, max_length=200)]


class Key(schemas.Answer):
    """A key, without itself: ``shown`` has its first and last letters."""

    id: str
    object: Literal["holdtrue.key"] = "holdtrue.key"
    project_id: str
    name: str
    shown: str
    role: auth.Role
    scopes: list[str]
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class KeyWithSecret(Key):
    """A key at the only moment at which it is told."""

    key: str


class KeyCreate(schemas.Request):
    """A key that is wished for. It ends with the key that makes it at the latest. Another project than one's own is for
    the provider."""

    name: Name
    role: auth.Role = "member"
    scopes: list[auth.Scope] = Field(default=[], max_length=20)
    expires_in: Annotated[StrictInt, Field(ge=60, le=_YEARS)] | None = None
    project_id: Annotated[schemas.Plain, Field(max_length=64)] | None = None


class KeyRotate(schemas.Request):
    """How many seconds the old key still works."""

    grace: StrictInt = Field(default=0, ge=0, le=30 * 86_400)


class OrganizationCreate(schemas.Request):
    """An organization; its slug stands in the names of its models."""

    name: Name
    slug: Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?$")]


class OrganizationAnswer(schemas.Answer):
    """An organization."""

    id: str
    object: Literal["holdtrue.organization"] = "holdtrue.organization"
    name: str
    slug: str
    created_at: int


class LimitsWish(schemas.Request):
    """A project's own limits; ``null`` and what is not named stay the service's."""

    requests_per_minute: Annotated[StrictInt, Field(ge=1, le=10**9)] | None = None
    jobs_active: Annotated[StrictInt, Field(ge=0, le=10**9)] | None = None
    tokens_per_day: Annotated[StrictInt, Field(ge=0, le=10**15)] | None = None
    storage_bytes: Annotated[StrictInt, Field(ge=0, le=10**15)] | None = None


class ProjectCreate(schemas.Request):
    """A project of an organization."""

    name: Name
    organization_id: Annotated[schemas.Plain, Field(max_length=64)]
    limits: LimitsWish = LimitsWish()


class ProjectAnswer(schemas.Answer):
    """A project."""

    id: str
    object: Literal["holdtrue.project"] = "holdtrue.project"
    organization_id: str
    name: str
    limits: dict[str, int]
    created_at: int


class UsageAnswer(schemas.Answer):
    """What the project has used, and what it may."""

    object: Literal["holdtrue.usage"] = "holdtrue.usage"
    project_id: str
    day: str
    today: dict[str, int]
    storage_bytes: int
    jobs_active: int
    limits: quotas.Limits


class AuditAnswer(schemas.Answer):
    """An entry of the audit log."""

    seq: int
    at: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    previous: str
    digest: str


class AuditPage(schemas.Answer):
    """Entries, the newest first."""

    object: Literal["list"] = "list"
    data: list[AuditAnswer]
    has_more: bool


class ReceiptAnswer(schemas.Answer):
    """The signed evidence of a job's adapter, as a DSSE envelope."""

    id: str
    object: Literal["holdtrue.receipt"] = "holdtrue.receipt"
    job_id: str
    adapter_digest: str
    envelope: dict[str, Any]
    created_at: int


def wire_key(row: ApiKey) -> dict[str, Any]:
    """Return a key as the wire has it."""
    return {name: getattr(row, name) for name in Key.model_fields if name != "object"}


def _project_for(session: Session, caller: Caller, project_id: str | None) -> str:
    if project_id is None or project_id == caller.project_id:
        return caller.project_id
    if caller.principal.role != "provider" or session.get(Project, project_id) is None:
        raise not_found("project", project_id, param="project_id")
    return project_id


def _key(session: Session, caller: Caller, key_id: str) -> ApiKey:
    row = session.get(ApiKey, key_id) if ids.is_id("key", key_id) else None
    if row is None or (row.project_id != caller.project_id and caller.principal.role != "provider"):
        raise not_found("key", key_id, param="key_id")
    if row.role == "provider" and caller.principal.role != "provider":
        raise not_found("key", key_id, param="key_id")
    hold_project(session, caller, row.project_id)  # what its requests are writing is done first
    session.refresh(row, with_for_update=True)
    return row


def _within(caller: Caller, role: str, scopes: list[Any]) -> None:
    """Nobody makes a key that may more than their own."""
    more = sorted(set(scopes) - caller.principal.scopes)
    if (role == "provider" and caller.principal.role != "provider") or more:
        raise ApiError(403, "A key may not do more than the one that makes it", param="role", code="beyond_own_rights")


def _ends(session: Session, caller: Caller, wished: int | None) -> int | None:
    """Nobody makes a key that works longer than their own."""
    own = auth.end_of(session.get_one(ApiKey, caller.principal.key_id))
    return min((end for end in (wished, own) if end is not None), default=None)


@router.get("/keys", responses=responses())
def list_keys(
    parts: PartsDep,
    caller: Admin,
    project_id: Annotated[str | None, Query(max_length=64, pattern="^[^\0]*$")] = None,
    after: After = None,
    limit: Limit = MOST,
) -> schemas.Page[Key]:
    """List a project's keys, the newest first."""
    with parts.db.read() as session:
        owned = ApiKey.project_id == _project_for(session, caller, project_id)
        if caller.principal.role != "provider":
            owned = and_(owned, ApiKey.role != "provider")
        found = take_by_time(session, ApiKey, select(ApiKey).where(owned), owned=owned, after=after, limit=limit)
        return page([Key(**wire_key(row)) for row in found.rows], found.more)


@router.post("/keys", responses=responses())
def create_key(body: KeyCreate, parts: PartsDep, caller: Admin) -> KeyWithSecret:
    """Make a key; this answer is the only one that has it."""
    now = clock.now()
    scopes: list[Any] = list(body.scopes) or [
        scope
        for scope in auth.SCOPES
        if scope in caller.principal.scopes and (scope != "admin" or body.role != "member")
    ]
    _within(caller, body.role, scopes)
    with parts.db.write() as session:
        project_id = _project_for(session, caller, body.project_id)
        hold_project(session, caller, project_id)
        row, secret = auth.create(
            session,
            project_id=project_id,
            name=body.name,
            role=body.role,
            scopes=scopes,
            expires_at=_ends(session, caller, None if body.expires_in is None else now + body.expires_in),
            now=now,
        )
        detail = {"role": row.role, "scopes": row.scopes, "project": row.project_id}
        audit.add(session, caller.principal.key_id, "key.create", row.id, now=now, detail=detail)
        return KeyWithSecret(**wire_key(row), key=secret)


@router.post("/keys/{key_id}/rotate", responses=responses())
def rotate_key(key_id: str, body: KeyRotate, parts: PartsDep, caller: Admin) -> KeyWithSecret:
    """Make a key in another's place, and end that one."""
    now = clock.now()
    with parts.db.write() as session:
        row = _key(session, caller, key_id)
        _within(caller, row.role, list(row.scopes))
        end = _ends(session, caller, row.expires_at)
        new, secret = auth.rotate(session, row, now=now, grace=body.grace, expires_at=end)
        audit.add(session, caller.principal.key_id, "key.rotate", row.id, now=now, detail={"new": new.id})
        return KeyWithSecret(**wire_key(new), key=secret)


@router.delete("/keys/{key_id}", responses=responses())
def revoke_key(key_id: str, parts: PartsDep, caller: Admin) -> Key:
    """End a key at once."""
    now = clock.now()
    with parts.db.write() as session:
        row = _key(session, caller, key_id)
        auth.revoke(session, row, now)
        audit.add(session, caller.principal.key_id, "key.revoke", row.id, now=now)
        return Key(**wire_key(row))


@router.get("/organizations", responses=responses())
def list_organizations(
    parts: PartsDep, caller: Provider, after: After = None, limit: Limit = MOST
) -> schemas.Page[OrganizationAnswer]:
    """List organizations, the oldest first; for the provider."""
    return _list_all(parts, Organization, OrganizationAnswer, after, limit)


def _list_all(parts: Parts, table: Any, kind: type[schemas.Answer], after: str | None, limit: int) -> Any:
    with parts.db.read() as session:
        found = take_by_time(session, table, select(table), owned=true(), after=after, limit=limit, order="asc")
        return page([kind(**_values(row, kind)) for row in found.rows], found.more)


@router.post("/organizations", responses=responses())
def create_organization(body: OrganizationCreate, parts: PartsDep, caller: Provider) -> OrganizationAnswer:
    """Make an organization; for the provider."""
    now = clock.now()
    with parts.db.write() as session:
        row = tenancy.create_organization(session, body.name, body.slug, now=now)
        audit.add(session, caller.principal.key_id, "organization.create", row.id, now=now)
        return OrganizationAnswer(**_values(row, OrganizationAnswer))


@router.get("/projects", responses=responses())
def list_projects(
    parts: PartsDep, caller: Provider, after: After = None, limit: Limit = MOST
) -> schemas.Page[ProjectAnswer]:
    """List projects, the oldest first; for the provider."""
    return _list_all(parts, Project, ProjectAnswer, after, limit)


@router.post("/projects", responses=responses())
def create_project(body: ProjectCreate, parts: PartsDep, caller: Provider) -> ProjectAnswer:
    """Make a project; for the provider."""
    now = clock.now()
    with parts.db.write() as session:
        if session.get(Organization, body.organization_id) is None:
            raise not_found("organization", body.organization_id, param="organization_id")
        row = tenancy.create_project(session, body.organization_id, body.name, now=now)
        row.limits = body.limits.model_dump(exclude_none=True)
        audit.add(session, caller.principal.key_id, "project.create", row.id, now=now, detail={"limits": row.limits})
        return ProjectAnswer(**_values(row, ProjectAnswer))


@router.post("/projects/{project_id}/limits", responses=responses())
def set_limits(project_id: str, body: LimitsWish, parts: PartsDep, caller: Provider) -> ProjectAnswer:
    """Set a project's own limits, in the place of those it had; for the provider."""
    with parts.db.write() as session:
        row = session.get(Project, project_id) if ids.is_id("proj", project_id) else None
        if row is None:
            raise not_found("project", project_id, param="project_id")
        row.limits = body.model_dump(exclude_none=True)
        audit.add(
            session, caller.principal.key_id, "project.limits", row.id, now=clock.now(), detail={"limits": row.limits}
        )
        return ProjectAnswer(**_values(row, ProjectAnswer))


def _values(row: Any, kind: type[schemas.Answer]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in kind.model_fields if name != "object"}


@router.get("/usage", responses=responses())
def usage(parts: PartsDep, caller: ModelsRead) -> UsageAnswer:
    """Return what the key's project has used today, and its limits."""
    now = clock.now()
    with parts.db.read() as session:
        return UsageAnswer(
            project_id=caller.project_id,
            day=quotas.today(now),
            today=quotas.used_today(session, caller.project_id, now=now),
            storage_bytes=quotas.stored_bytes(session, caller.project_id),
            jobs_active=quotas.jobs_active(session, caller.project_id),
            limits=caller.limits,
        )


def receipt_of(session: Session, job: Job) -> Receipt | None:
    """Return the newest receipt of a job's own adapter; those of its checkpoints are for the checkpoints."""
    checkpoints = select(Model.id).where(Model.job_id == job.id, Model.kind == "checkpoint")
    own = or_(Receipt.model_id.is_(None), Receipt.model_id.not_in(checkpoints))
    query = select(Receipt).where(Receipt.job_id == job.id, own).order_by(Receipt.created_at.desc(), Receipt.id)
    return session.scalars(query.limit(1)).first()


@router.get("/jobs/{fine_tuning_job_id}/receipt", responses=responses())
def job_receipt(fine_tuning_job_id: str, parts: PartsDep, caller: JobsRead) -> ReceiptAnswer:
    """Return the signed receipt of a job's adapter."""
    with parts.db.read() as session:
        job = get_job(session, caller.project_id, fine_tuning_job_id)
        row = receipt_of(session, job)
        if row is None:
            raise not_found("receipt of", job.id, param="fine_tuning_job_id")
        return ReceiptAnswer(**_values(row, ReceiptAnswer))


@router.get(
    "/jobs/{fine_tuning_job_id}/card",
    response_class=Response,
    responses={**responses(), 200: {"content": {"text/markdown": {"schema": {"type": "string"}}}}},
)
def job_card(fine_tuning_job_id: str, parts: PartsDep, caller: JobsRead) -> Response:
    """Return a model card of a job's adapter in Hugging Face's format: what its receipt says, as text."""
    found = job_receipt(fine_tuning_job_id, parts, caller)
    try:
        text = model_card(signing.payload(found.envelope))
    except (ValueError, LookupError, TypeError):
        raise not_found("model card of", found.job_id, param="fine_tuning_job_id") from None
    return Response(text, media_type="text/markdown; charset=utf-8")


@router.get("/audit", responses=responses())
def audit_log(
    parts: PartsDep,
    caller: Provider,
    before: Annotated[int | None, Query(ge=1, le=2**53)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> AuditPage:
    """List the audit log, the newest first; for the provider."""
    query = select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(limit + 1)
    with parts.db.read() as session:
        rows = session.scalars(query if before is None else query.where(AuditEntry.seq < before)).all()
        items = [AuditAnswer(**_values(row, AuditAnswer)) for row in rows[:limit]]
    return AuditPage(data=items, has_more=len(rows) > limit)
