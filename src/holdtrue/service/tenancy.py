"""Organizations and projects, and what a service has from its first start."""

from __future__ import annotations

import re
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from holdtrue.errors import SpecError
from holdtrue.models.source import ALIASES
from holdtrue.service import audit, auth, clock, ids
from holdtrue.service.policy import default_document
from holdtrue.service.policy import store as policies
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Model, Organization, Project

DEFAULT = "default"
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")


class SlugTakenError(SpecError):
    """Another organization has this slug."""


class Bootstrap(NamedTuple):
    """What a first start made: the key that is shown once. ``None`` where there was everything already."""

    key: str | None


def bootstrap(db: Database) -> Bootstrap:
    """Make what is not there yet: the default organization, project and key, the base models, a policy for each.

    Any number of processes may do it at once, as often as they like; one of them gets the key.
    """
    for _ in range(2):
        try:
            with db.write() as session:
                return Bootstrap(_bootstrap(session))
        except (IntegrityError, SlugTakenError):
            continue  # another process was first; the second look finds its rows
    return Bootstrap(None)


def _bootstrap(session: Session) -> str | None:
    now = clock.now()
    key = None
    if session.scalar(select(Organization.id).limit(1)) is None:
        organization = create_organization(session, DEFAULT, DEFAULT, now=now)
        project = create_project(session, organization.id, DEFAULT, now=now)
        row, key = auth.create(session, project_id=project.id, name="first key", role="provider", now=now)
        audit.add(session, "system", "service.bootstrap", project.id, now=now, detail={"key": row.id})
    for name in ALIASES:
        _base_model(session, name, now)
    return key


def _base_model(session: Session, name: str, now: int) -> None:
    if session.scalar(select(Model.id).where(Model.name == name)) is not None:
        return
    session.add(
        Model(
            id=ids.new("model"),
            name=name,
            project_id=None,
            kind="base",
            status="ready",
            base_model=name,
            job_id=None,
            adapter=None,
            adapter_digest=None,
            created_at=now,
            deleted_at=None,
        )
    )
    session.flush()
    if policies.active(session, name) is None:
        policy = policies.save(session, default_document(name), actor="system", now=now, note="from the first start")
        policies.activate(session, policy, actor="system", now=now)


def create_organization(session: Session, name: str, slug: str, *, now: int) -> Organization:
    """Make an organization; ``slug`` stands in the names of its models.

    Raises:
        SpecError: the slug is not of small letters, digits and dashes, or is taken (``SlugTakenError``).
    """
    if _SLUG.fullmatch(slug) is None:
        raise SpecError(f"slug {slug!r} must be 1 to 40 small letters, digits and inner dashes")
    taken = SlugTakenError(f"the slug {slug!r} is taken; choose another")
    if session.scalar(select(Organization.id).where(Organization.slug == slug)) is not None:
        raise taken
    organization = Organization(id=ids.new("org"), name=name, slug=slug, created_at=now)
    try:
        with session.begin_nested():
            session.add(organization)
    except IntegrityError:  # somebody else was making it: the insert has waited for them
        raise taken from None
    return organization


def create_project(session: Session, organization_id: str, name: str, *, now: int) -> Project:
    """Make a project; ``SpecError`` where there is no such organization."""
    if session.get(Organization, organization_id) is None:
        raise SpecError(f"there is no organization {organization_id!r}")
    project = Project(id=ids.new("proj"), organization_id=organization_id, name=name, limits={}, created_at=now)
    session.add(project)
    session.flush()
    return project


def project_of(session: Session, project_id: str | None) -> Project:
    """Return a project by its id; the oldest one for ``None``. ``SpecError`` where there is none."""
    if project_id is None:
        found = session.scalars(select(Project).order_by(Project.created_at, Project.id).limit(1)).first()
        if found is None:
            raise SpecError("this service has not been started yet; run `holdtrue serve` first")
        return found
    found = session.get(Project, project_id)
    if found is None:
        raise SpecError(f"there is no project {project_id!r}; `holdtrue keys projects` lists them")
    return found
