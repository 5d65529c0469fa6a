"""Signed-in browsers: a random cookie that is kept as its hash, and a token against forged forms."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from holdtrue.service import auth
from holdtrue.service.store.schema import ApiKey, Organization, Project, WebSession

HOURS = 12
"""How long a sign-in lasts, whatever is done meanwhile."""
_LONGEST = 100


@dataclass(frozen=True)
class Visitor:
    """Who looks at a page.

    Attributes:
        found: the key's principal, and its project's limits.
        csrf: what every form must send back.
        key_name, project, organization: for people.
    """

    found: auth.Found
    csrf: str
    key_name: str
    project: str
    organization: str

    @property
    def principal(self) -> auth.Principal:
        """The key that was signed in with."""
        return self.found.principal

    @property
    def is_provider(self) -> bool:
        """Whether the provider's pages are there."""
        return self.principal.role == "provider" and self.principal.may("admin")


class Opened(NamedTuple):
    """A new session: its cookie, at the only moment at which it can be read, and when it ends."""

    cookie: str
    expires_at: int


def start(session: Session, key: ApiKey, now: int) -> Opened:
    """Sign a key in."""
    cookie = secrets.token_urlsafe(32)
    end = min(now + HOURS * 3600, key.expires_at or now + HOURS * 3600)
    session.add(
        WebSession(
            digest=_digest(cookie), key_id=key.id, csrf=secrets.token_urlsafe(32), created_at=now, expires_at=end
        )
    )
    session.flush()
    return Opened(cookie, end)


def find(session: Session, cookie: str, now: int) -> Visitor | None:
    """Return who a cookie stands for; ``None`` once it or its key has ended."""
    if not cookie or len(cookie) > _LONGEST:
        return None
    row = session.execute(
        select(WebSession, ApiKey, Project, Organization)
        .join(ApiKey, ApiKey.id == WebSession.key_id)
        .join(Project, Project.id == ApiKey.project_id)
        .join(Organization, Organization.id == Project.organization_id)
        .where(WebSession.digest == _digest(cookie), WebSession.expires_at > now)
    ).one_or_none()
    if row is None:
        return None
    web, key, project, organization = row
    found = auth.found_of(key, project, now)
    return None if found is None else Visitor(found, web.csrf, key.name, project.name, organization.name)


def end(session: Session, cookie: str) -> None:
    """Sign out."""
    session.execute(delete(WebSession).where(WebSession.digest == _digest(cookie)))


def same(one: str, other: str) -> bool:
    """Whether two tokens are the same, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode("utf-8", "surrogatepass"))


def sign_in_token(visit: str) -> str:
    """Return the token of the sign-in form for a browser that has no session: bound to a cookie of its own."""
    return hashlib.sha256(b"sign-in:" + visit.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(cookie: str) -> str:
    return hashlib.sha256(cookie.encode("utf-8", "surrogatepass")).hexdigest()
