"""API keys: shown once, kept as a digest, found by it; and who somebody is once their key was found."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from holdtrue.errors import SpecError, nearest
from holdtrue.service import ids
from holdtrue.service.store.schema import ApiKey, Project

Role = Literal["member", "admin", "provider"]
"""``member`` uses a project; ``admin`` also has its keys; ``provider`` has the whole service."""
Scope = Literal[
    "files.read",
    "files.write",
    "fine_tuning.read",
    "fine_tuning.write",
    "models.read",
    "models.write",
    "chat",
    "admin",
]
SCOPES: tuple[str, ...] = get_args(Scope)
ROLES: tuple[str, ...] = get_args(Role)
_ALPHABET = string.ascii_letters + string.digits
_LETTERS = 48
_LONGEST = 256
_USED_EVERY = 300
"""Seconds between two notes of a key's last use: a note at each request would be a write at each request."""


@dataclass(frozen=True)
class Principal:
    """Who makes a request.

    Attributes:
        key_id: the key's id, which is what logs and the audit log name.
        project_id, organization_id: the tenant; everything a request reads or writes belongs to them.
        role: see ``Role``.
        scopes: what the key may do; a scope that is not there is refused whatever the role.
    """

    key_id: str
    project_id: str
    organization_id: str
    role: Role
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Whether the key has a scope; ``admin`` needs the role as well."""
        return scope in self.scopes and (scope != "admin" or self.role != "member")


class NewKey(NamedTuple):
    """A key at the only moment at which it can be read."""

    row: ApiKey
    secret: str


class Found(NamedTuple):
    """A valid key's principal, its project's own limits, and whether its last use should be noted again."""

    principal: Principal
    limits: dict[str, Any]
    stale: bool


def digest(secret: str) -> str:
    """Return what is stored of a key. It has 285 random bits, so that one round of SHA-256 cannot be searched."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def create(
    session: Session,
    *,
    project_id: str,
    name: str,
    now: int,
    role: str = "member",
    scopes: Sequence[str] = (),
    expires_at: int | None = None,
) -> NewKey:
    """Make a key for a project.

    Args:
        name: for people.
        scopes: what it may do; empty means all that its role may.
        expires_at: when it stops working; ``None`` means never.

    Raises:
        SpecError: an unknown role or scope, a scope beyond the role, or an end that has passed.
    """
    if role not in ROLES:
        raise SpecError(f"role must be one of {', '.join(ROLES)}, and not {role!r}")
    granted = list(dict.fromkeys(scopes)) or [scope for scope in SCOPES if scope != "admin" or role != "member"]
    for scope in granted:
        if scope not in SCOPES:
            raise SpecError(f"there is no scope {scope!r}{nearest(scope, SCOPES)}: {', '.join(SCOPES)}")
    if role == "member" and "admin" in granted:
        raise SpecError("the scope 'admin' needs the role admin or provider")
    if expires_at is not None and expires_at <= now:
        raise SpecError("expires_at must lie in the future")
    secret = "sk-" + "".join(secrets.choice(_ALPHABET) for _ in range(_LETTERS))
    row = ApiKey(
        id=ids.new("key"),
        project_id=project_id,
        name=name,
        digest=digest(secret),
        shown=f"{secret[:6]}…{secret[-4:]}",
        role=role,
        scopes=granted,
        created_at=now,
        expires_at=expires_at,
        revoked_at=None,
        last_used_at=None,
    )
    session.add(row)
    session.flush()
    return NewKey(row, secret)


def find(session: Session, secret: str, now: int) -> Found | None:
    """Return the principal of a valid key, or ``None``.

    Every text, well-formed or not, takes the same way: it is hashed and the hash is looked up in an index. What an
    attacker could time is the lookup of a hash that they cannot steer.
    """
    wanted = digest(secret[:_LONGEST])
    found = session.execute(
        select(ApiKey, Project).join(Project, Project.id == ApiKey.project_id).where(ApiKey.digest == wanted)
    ).one_or_none()
    stored = found[0].digest if found else "0" * len(wanted)
    same = hmac.compare_digest(stored, wanted) and len(secret) <= _LONGEST
    return found_of(found[0], found[1], now) if found is not None and same else None


def found_of(row: ApiKey, project: Project, now: int) -> Found | None:
    """Return the principal of a key and its project, or ``None`` where the key has ended."""
    if not is_valid(row, now):
        return None
    stale = row.last_used_at is None or row.last_used_at + _USED_EVERY <= now
    return Found(
        Principal(row.id, row.project_id, project.organization_id, cast(Role, row.role), frozenset(row.scopes)),
        project.limits,
        stale,
    )


def is_valid(row: ApiKey, now: int) -> bool:
    """Whether a key works: neither revoked, nor beyond its end."""
    return not (row.revoked_at is not None and row.revoked_at <= now) and (
        row.expires_at is None or row.expires_at > now
    )


def end_of(row: ApiKey) -> int | None:
    """Return when a key stops working, as far as that is settled; ``None`` means never."""
    return min((end for end in (row.expires_at, row.revoked_at) if end is not None), default=None)


def note_use(session: Session, key_id: str, now: int) -> None:
    """Remember when a key was last used."""
    row = session.get(ApiKey, key_id)
    if row is not None:
        row.last_used_at = now


def revoke(session: Session, row: ApiKey, now: int) -> None:
    """End a key at once; one that has ended stays as it is."""
    if row.revoked_at is None or row.revoked_at > now:
        row.revoked_at = now


def rotate(session: Session, row: ApiKey, *, now: int, grace: int = 0, expires_at: int | None = None) -> NewKey:
    """Make a key like this one, and end this one after ``grace`` seconds, or when it was to end anyway.

    Args:
        expires_at: of the new key; not given, it is this one's.

    Raises:
        SpecError: the key has ended already.
    """
    if not is_valid(row, now):
        raise SpecError(f"{row.id} was revoked or has expired; create a new key")
    new = create(
        session,
        project_id=row.project_id,
        name=row.name,
        now=now,
        role=row.role,
        scopes=row.scopes,
        expires_at=row.expires_at if expires_at is None else expires_at,
    )
    row.revoked_at = now + grace if row.revoked_at is None else min(row.revoked_at, now + grace)
    return new


def keys_of(session: Session, project_id: str | None = None) -> list[ApiKey]:
    """Return the keys of a project, or of all, the newest first."""
    query = select(ApiKey).order_by(ApiKey.created_at.desc(), ApiKey.id)
    return list(session.scalars(query if project_id is None else query.where(ApiKey.project_id == project_id)))
