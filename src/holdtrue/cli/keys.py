"""holdtrue keys, organizations, projects, audit: administration on the machine that has the database."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.output import Result
from holdtrue.cli.serve import BlobUrl, DatabaseUrl, Home, settings_with
from holdtrue.errors import RunError, SpecError

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy.orm import Session

    from holdtrue.service.store.schema import ApiKey

ACTOR = "command line"
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
keys = typer.Typer(help="Make, list, rotate and revoke API keys.", no_args_is_help=True)
organizations = typer.Typer(help="Make and list organizations.", no_args_is_help=True)
projects = typer.Typer(help="Make and list projects, set their limits, erase them.", no_args_is_help=True)
audit = typer.Typer(help="Read and check the audit log.", no_args_is_help=True)


@contextlib.contextmanager
def opened(home: Any, database_url: str | None) -> Iterator[Session]:
    from sqlalchemy import select
    from sqlalchemy.exc import SQLAlchemyError

    from holdtrue.service.store.database import Database
    from holdtrue.service.store.schema import Organization

    settings = settings_with(home=home, database_url=database_url)
    db = Database(settings.database)
    if db.is_sqlite and db.url.database and not settings_path_exists(db.url.database):
        raise SpecError(f"there is no service in {settings.home}; run `holdtrue serve` first, or name it with --home")
    try:
        with db.write() as session:
            try:
                session.scalar(select(Organization.id).limit(1))
            except SQLAlchemyError:
                raise RunError("the database has no tables of holdtrue yet; run `holdtrue serve` first") from None
            yield session
    finally:
        db.close()


def settings_path_exists(path: str) -> bool:
    """Whether a database's file is there; opening it would make an empty one."""
    from pathlib import Path

    return Path(path).is_file()


def table(rows: list[dict[str, Any]], names: tuple[str, ...]) -> Result:
    def show(console: Console) -> None:
        from rich.table import Table

        table = Table(*(name.replace("_", " ") for name in names))
        for row in rows:
            table.add_row(*(_cell(name, row[name]) for name in names))
        console.print(table, markup=False)

    return Result(rows, show)


def _cell(name: str, value: Any) -> str:
    import datetime

    from rich.markup import escape

    if value is None:
        return "–"
    if name.endswith("_at") or name == "at":
        return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return escape(", ".join(value) if isinstance(value, list) else str(value))


def _key_values(row: ApiKey) -> dict[str, Any]:
    names = ("id", "project_id", "name", "shown", "role", "scopes", "created_at", "expires_at", "revoked_at")
    return {name: getattr(row, name) for name in (*names, "last_used_at")}


def _new_key(values: dict[str, Any], secret: str) -> Result:
    def show(console: Console) -> None:
        console.print(f"{values['id']} ({values['role']} of {values['project_id']})", markup=False)
        console.print(f"shown only now: {secret}", markup=False, soft_wrap=True)

    return Result({**values, "key": secret}, show)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    project: Annotated[
        str | None, typer.Option(help="The project's id [default: the first].", show_default=False)
    ] = None,
    role: Annotated[str, typer.Option(help="member, admin or provider.")] = "member",
    scope: Annotated[
        list[str] | None, typer.Option(help="What it may do; again for more [default: all of its role].")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=3660, help="When it expires [default: never].")] = None,
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Make a key and print it, this once."""
    from holdtrue.service import audit as log
    from holdtrue.service import auth, clock, tenancy

    now = clock.now()
    with opened(home, database_url) as session:
        row, secret = auth.create(
            session,
            project_id=tenancy.project_of(session, project).id,
            name=name,
            role=role,
            scopes=scope or (),
            expires_at=None if days is None else now + days * 86_400,
            now=now,
        )
        log.add(session, ACTOR, "key.create", row.id, now=now, detail={"role": role, "scopes": row.scopes})
        return _new_key(_key_values(row), secret)


@keys.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Of one project.", show_default=False)] = None,
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """List keys, without the keys themselves."""
    from holdtrue.service import auth

    with opened(home, database_url) as session:
        rows = [_key_values(row) for row in auth.keys_of(session, project)]
    return table(
        rows, ("id", "project_id", "name", "shown", "role", "scopes", "expires_at", "revoked_at", "last_used_at")
    )


def _find(session: Session, key_id: str) -> ApiKey:
    from holdtrue.service import quotas
    from holdtrue.service.store.schema import ApiKey

    row = session.get(ApiKey, key_id)
    if row is None:
        raise SpecError(f"there is no key {key_id!r}; `holdtrue keys list` lists them")
    quotas.lock_project(session, row.project_id)  # what its requests are writing is done first
    session.refresh(row)
    return row


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="The key's id.")],
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """End a key at once."""
    from holdtrue.service import audit as log
    from holdtrue.service import auth, clock

    with opened(home, database_url) as session:
        row = _find(session, key)
        auth.revoke(session, row, clock.now())
        log.add(session, ACTOR, "key.revoke", row.id, now=clock.now())
        return table([_key_values(row)], ("id", "name", "role", "revoked_at"))


@keys.command("rotate")
def rotate_key(
    key: Annotated[str, typer.Argument(help="The key's id.")],
    grace: Annotated[int, typer.Option(min=0, max=2_592_000, help="Seconds that the old key still works.")] = 0,
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Make a key in another's place, and end that one."""
    from holdtrue.service import audit as log
    from holdtrue.service import auth, clock

    with opened(home, database_url) as session:
        old = _find(session, key)
        row, secret = auth.rotate(session, old, now=clock.now(), grace=grace)
        log.add(session, ACTOR, "key.rotate", old.id, now=clock.now(), detail={"new": row.id})
        return _new_key(_key_values(row), secret)


@organizations.command("create")
def create_organization(
    name: Annotated[str, typer.Argument(help="Its name.")],
    slug: Annotated[str, typer.Option(help="Small letters, digits, dashes: stands in the names of its models.")],
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Make an organization."""
    from holdtrue.service import audit as log
    from holdtrue.service import clock, tenancy

    with opened(home, database_url) as session:
        row = tenancy.create_organization(session, name, slug, now=clock.now())
        log.add(session, ACTOR, "organization.create", row.id, now=clock.now())
        return table([{"id": row.id, "slug": row.slug, "name": row.name}], ("id", "slug", "name"))


@organizations.command("list")
def list_organizations(home: Home = None, database_url: DatabaseUrl = None, as_json: AsJson = False) -> Result:
    """List organizations."""
    from sqlalchemy import select

    from holdtrue.service.store.schema import Organization

    with opened(home, database_url) as session:
        found = session.scalars(select(Organization).order_by(Organization.created_at, Organization.id))
        rows = [{"id": row.id, "slug": row.slug, "name": row.name, "created_at": row.created_at} for row in found]
    return table(rows, ("id", "slug", "name", "created_at"))


def _project_values(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("id", "organization_id", "name", "limits", "created_at")}


@projects.command("create")
def create_project(
    name: Annotated[str, typer.Argument(help="Its name.")],
    organization: Annotated[str, typer.Option(help="The organization's id.")],
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Make a project."""
    from holdtrue.service import audit as log
    from holdtrue.service import clock, tenancy

    with opened(home, database_url) as session:
        row = tenancy.create_project(session, organization, name, now=clock.now())
        log.add(session, ACTOR, "project.create", row.id, now=clock.now())
        return table([_project_values(row)], ("id", "organization_id", "name", "limits"))


@projects.command("list")
def list_projects(home: Home = None, database_url: DatabaseUrl = None, as_json: AsJson = False) -> Result:
    """List projects with their own limits."""
    from sqlalchemy import select

    from holdtrue.service.store.schema import Project

    with opened(home, database_url) as session:
        rows = [
            _project_values(row) for row in session.scalars(select(Project).order_by(Project.created_at, Project.id))
        ]
    return table(rows, ("id", "organization_id", "name", "limits", "created_at"))


@projects.command("limits")
def project_limits(
    project: Annotated[str, typer.Argument(help="The project's id.")],
    limit: Annotated[
        list[str] | None, typer.Option(help="NAME=NUMBER; again for more. None given: the service's.")
    ] = None,
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Set a project's own limits, in the place of those it had."""
    from holdtrue.service import audit as log
    from holdtrue.service import clock, tenancy
    from holdtrue.service.quotas import Limits

    values = {}
    for text in limit or []:
        name, _, number = text.partition("=")
        if not number.isdigit():
            raise SpecError(f"--limit must be NAME=NUMBER, and not {text!r}; names: {', '.join(Limits.model_fields)}")
        values[name] = int(number)
    Limits().with_overrides(values)
    with opened(home, database_url) as session:
        row = tenancy.project_of(session, project)
        row.limits = values
        log.add(session, ACTOR, "project.limits", row.id, now=clock.now(), detail={"limits": values})
        return table([_project_values(row)], ("id", "name", "limits"))


@projects.command("erase")
def erase_project(
    project: Annotated[str, typer.Argument(help="The project's id.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, nothing is erased.")] = False,
    home: Home = None,
    database_url: DatabaseUrl = None,
    blob_url: BlobUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Erase all that a project brought or had made, for good, and revoke its keys."""
    from holdtrue.service import clock
    from holdtrue.service.store.blobs import Blobs
    from holdtrue.service.store.database import Database
    from holdtrue.service.store.erasure import erase_project as erase

    if not yes:
        raise SpecError(f"everything of {project} would go for good: files, models, jobs' texts; say --yes to do it")
    with opened(home, database_url):
        pass  # there is a service
    settings = settings_with(home=home, database_url=database_url, blob_url=blob_url)
    db = Database(settings.database)
    with contextlib.closing(db):
        erased = erase(db, Blobs(settings.blobs), project, clock.now(), actor=ACTOR)

    def show(console: Console) -> None:
        console.print(", ".join(f"{count} {name}" for name, count in erased._asdict().items()) + " erased")

    return Result({"project": project, **erased._asdict()}, show)


@audit.command("list")
def list_audit(
    last: Annotated[int, typer.Option(min=1, max=100_000, help="How many entries, the newest first.")] = 50,
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """List who did what."""
    from sqlalchemy import select

    from holdtrue.service.store.schema import AuditEntry

    names = ("seq", "at", "actor", "action", "subject", "detail")
    with opened(home, database_url) as session:
        found = session.scalars(select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(last))
        rows = [{name: getattr(row, name) for name in (*names, "previous", "digest")} for row in found]
    return table(rows, names)


@audit.command("verify")
def verify_audit(home: Home = None, database_url: DatabaseUrl = None, as_json: AsJson = False) -> Result:
    """Check the chain of the audit log; exit code 1 where it is broken."""
    from holdtrue.service import audit as log

    with opened(home, database_url) as session:
        verdict = log.verify(session)

    def show(console: Console) -> None:
        told = f"broken at entry {verdict.broken}" if verdict.broken is not None else "whole"
        console.print(f"{told}: {verdict.entries} entries, the last good digest is {verdict.head}", soft_wrap=True)

    document = {"entries": verdict.entries, "head": verdict.head, "broken": verdict.broken}
    return Result(document, show, exit_code=0 if verdict.broken is None else 1)
