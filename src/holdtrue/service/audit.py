"""Who did what: an append-only log in which each entry carries the hash of the one before it.

A changed, missing or inserted entry shows. A cut-off end shows only to somebody who kept a later entry's digest: keep
the head elsewhere from time to time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from holdtrue.service.store.schema import AuditEntry

FIRST = "0" * 64
"""What the first entry has before it."""
_LOCK = 0x686F6C64
"""The advisory lock under which PostgreSQL appends one entry at a time; SQLite has one writer anyway."""


class Verdict(NamedTuple):
    """What a check found: how many entries, the last good digest, and the first broken ``seq`` or ``None``."""

    entries: int
    head: str
    broken: int | None


def add(
    session: Session,
    actor: str,
    action: str,
    subject: str,
    *,
    now: int,
    detail: Mapping[str, Any] | None = None,
) -> AuditEntry:
    """Append an entry within the transaction that does what it tells; best as its last step.

    Args:
        actor: a key's id, a person's name, or ``system``.
        action: such as ``job.create``.
        subject: the id of what it was done to.
        detail: JSON values; never content of a customer, never a secret.
    """
    session.flush()  # whoever writes locks rows first and the log last, so that no two wait for each other
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    last = session.scalars(select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(1)).first()
    entry = AuditEntry(
        seq=last.seq + 1 if last else 1,
        at=now,
        actor=actor,
        action=action,
        subject=subject,
        detail=dict(detail or {}),
        previous=last.digest if last else FIRST,
    )
    entry.digest = entry_digest(entry)
    session.add(entry)
    session.flush()
    return entry


def entry_digest(entry: AuditEntry) -> str:
    """Return the SHA-256 over all of an entry and the digest of the one before it."""
    values = [entry.seq, entry.at, entry.actor, entry.action, entry.subject, entry.detail, entry.previous]
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(session: Session) -> Verdict:
    """Walk the whole chain."""
    previous, count = FIRST, 0
    for entry in session.scalars(select(AuditEntry).order_by(AuditEntry.seq).execution_options(yield_per=1000)):
        count += 1
        if entry.seq != count or entry.previous != previous or entry.digest != entry_digest(entry):
            return Verdict(count, previous, entry.seq)
        previous = entry.digest
    return Verdict(count, previous, None)
