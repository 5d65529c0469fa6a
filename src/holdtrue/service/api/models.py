"""/v1/models: base models, and a tenant's own that have passed their gate."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from holdtrue.service import audit, clock
from holdtrue.service.api import schemas
from holdtrue.service.api.context import ModelsRead, ModelsWrite, PartsDep, hold_project
from holdtrue.service.api.errors import ApiError, not_found, responses
from holdtrue.service.api.pages import After
from holdtrue.service.quotas import ACTIVE
from holdtrue.service.store.schema import Job, Model, Organization, Project
from holdtrue.service.store.walk import walk

LONGEST = 300
router = APIRouter(tags=["models"])
Name = Annotated[str, Path(max_length=LONGEST, description="The model's name.")]


def usable(project_id: str) -> tuple[ColumnElement[bool], ...]:
    """Return when a model is there for a tenant: once released, and if it is a base model or the tenant's own."""
    return (Model.status == "ready", or_(Model.project_id.is_(None), Model.project_id == project_id))


def get_model(session: Session, project_id: str, name: str, *, param: str = "model") -> Model:
    """Return a model by its name; 404 for another tenant's, a blocked one, a deleted one, and no name at all."""
    row = None
    if 0 < len(name) <= LONGEST and "\0" not in name:
        row = session.scalar(select(Model).where(Model.name == name, *usable(project_id)))
    if row is None:
        raise ApiError(
            404,
            f"The model {name[:80]!r} does not exist, or you have no access to it",
            param=param,
            code="model_not_found",
        )
    return row


def _wire(row: Model, owner: str | None) -> schemas.Model:
    return schemas.Model(id=row.name, created=row.created_at, owned_by=owner or "system")


def _owner(session: Session, project_id: str) -> str:
    query = select(Organization.slug).join(Project, Project.organization_id == Organization.id)
    return session.scalar(query.where(Project.id == project_id)) or ""


@router.get("/v1/models", responses=responses())
def list_models(
    parts: PartsDep,
    caller: ModelsRead,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> schemas.Page[schemas.Model]:
    """List base models, and then the project's own, the newest first.

    ``after`` and ``limit`` are additions; without them the thousand newest are listed.
    """
    with parts.db.read() as session:
        owner = _owner(session, caller.project_id)
        base = select(Model).where(Model.project_id.is_(None), Model.status == "ready").order_by(Model.seq)
        items, behind = [], None
        if after is None:
            items = [_wire(row, None) for row in session.scalars(base)]
        else:
            named = Model.name == schemas.plain_query(after)
            last = session.scalar(select(Model).where(named, Model.project_id == caller.project_id))
            if last is None:
                raise not_found("model to go on after:", after, param="after")
            behind = last.seq
        within = [(Model.project_id, caller.project_id), (Model.status, "ready")]
        own = walk(session, select(Model), within, Model.seq, behind=behind)
        rows = session.scalars(own.limit(limit + 1)).all()
        items += [_wire(row, owner) for row in rows[:limit]]
        first, last_id = (items[0].id, items[-1].id) if items else (None, None)
        return schemas.Page(data=items, first_id=first, last_id=last_id, has_more=len(rows) > limit)


@router.get("/v1/models/{model:path}", responses=responses())
def retrieve_model(model: Name, parts: PartsDep, caller: ModelsRead) -> schemas.Model:
    """Return what is known of a model."""
    with parts.db.read() as session:
        row = get_model(session, caller.project_id, model)
        return _wire(row, None if row.project_id is None else _owner(session, row.project_id))


@router.delete("/v1/models/{model:path}", responses=responses(409))
def delete_model(model: Name, parts: PartsDep, caller: ModelsWrite) -> schemas.ModelDeleted:
    """Delete a tuned model; it is served no more, and its adapter goes with the provider's retention."""
    with parts.db.write() as session:
        hold_project(session, caller)  # as whoever creates a job from the model does
        row = get_model(session, caller.project_id, model)
        if row.project_id is None:
            raise ApiError(403, f"{row.name} is a base model and cannot be deleted", param="model", code="base_model")
        child = session.scalar(
            select(Job.id).where(
                Job.status.in_(ACTIVE), Job.project_id == caller.project_id, Job.parent_model_id == row.id
            )
        )
        if child is not None:
            raise ApiError(
                409,
                f"The job {child} starts from this model and has not ended; cancel that first",
                param="model",
                code="model_in_use",
                headers={"x-should-retry": "false"},
            )
        now = clock.now()
        row.status, row.deleted_at = "deleted", now
        audit.add(session, caller.principal.key_id, "model.delete", row.id, now=now)
        return schemas.ModelDeleted(id=row.name, deleted=True)
