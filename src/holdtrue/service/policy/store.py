"""Policy versions in the database: written once, never changed; one in force for each base model."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from holdtrue.errors import RunError, SpecError
from holdtrue.runs.spec import differences
from holdtrue.service import audit, ids
from holdtrue.service.policy.document import PolicyDocument, check_paths, parse_policy, read_policy
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import ActivePolicy, Policy


class PolicyUnreadableError(RunError):
    """A stored version cannot be read as it was written: no job may run under it, or under another in its place."""


@dataclass(frozen=True)
class Change:
    """What differs between two versions.

    Attributes:
        values: a line for each value that differs, defaults included.
        text: the unified difference of the YAML texts.
    """

    values: tuple[str, ...]
    text: str


def meaning(document: PolicyDocument) -> str:
    """Return all values of a document, defaults included, as one JSON text: comments and order do not count."""
    return json.dumps(document.canonical(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(document: PolicyDocument) -> str:
    """Return the SHA-256 of a document's meaning."""
    return _sha256(meaning(document))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save(session: Session, text: str, *, actor: str, now: int, note: str = "") -> Policy:
    """Write a new version for the document's base model; the latest one is returned where it says the same.

    Raises:
        SpecError: the text is no valid policy, or names a file by a relative path.
    """
    document = parse_policy(text)
    check_paths(document)
    newest = _newest(session, document.base_model)
    name = digest(document)
    if newest is not None and newest.digest == name:
        return newest
    policy = Policy(
        id=ids.new("policy"),
        base_model=document.base_model,
        version=newest.version + 1 if newest else 1,
        document=text,
        meaning=meaning(document),
        digest=name,
        note=note,
        created_by=actor,
        created_at=now,
    )
    session.add(policy)
    session.flush()
    return policy


def activate(session: Session, policy: Policy, *, actor: str, now: int) -> Policy | None:
    """Put a version in force for its base model and return the one that was; jobs keep the version they began with.

    The audit log says so, whoever asked.
    """
    current = session.get(ActivePolicy, policy.base_model, with_for_update=True)
    before = None if current is None else session.get(Policy, current.policy_id)
    if current is None:
        session.add(
            ActivePolicy(base_model=policy.base_model, policy_id=policy.id, activated_by=actor, activated_at=now)
        )
    else:
        current.policy_id, current.activated_by, current.activated_at = policy.id, actor, now
    was = None if before is None else before.version
    detail = {"base_model": policy.base_model, "version": policy.version, "before": was}
    audit.add(session, actor, "policy.activate", policy.id, now=now, detail=detail)
    return before


def active(session: Session, base_model: str) -> Policy | None:
    """Return the version in force; ``None`` where nobody put one in force: then no job may start on that base."""
    row = session.get(ActivePolicy, base_model)
    return None if row is None else session.get_one(Policy, row.policy_id)


def version(session: Session, base_model: str, number: int) -> Policy:
    """Return one version; ``SpecError`` when there is none of that number."""
    found = session.scalar(select(Policy).where(Policy.base_model == base_model, Policy.version == number))
    if found is None:
        raise SpecError(f"there is no version {number} of the policy for {base_model}")
    return found


def history(session: Session, base_model: str) -> list[Policy]:
    """Return all versions, the newest first."""
    return list(session.scalars(select(Policy).where(Policy.base_model == base_model).order_by(Policy.version.desc())))


def document_of(policy: Policy) -> PolicyDocument:
    """Return the value that a stored version holds, with the defaults that were in force when it was saved.

    Raises:
        PolicyUnreadableError: what is stored is not what was written, or this version of holdtrue cannot read it: a
            job must not run under anything but the policy it began with.
    """
    where = f"version {policy.version} of the policy for {policy.base_model}"
    try:
        if policy.meaning is None:
            document = parse_policy(policy.document, where)
            same = digest(document) == policy.digest
        else:
            same = _sha256(policy.meaning) == policy.digest
            document = read_policy(json.loads(policy.meaning), where) if same else None
    except ValueError as error:
        raise PolicyUnreadableError(
            f"{where} cannot be read by this version of holdtrue. Save it again, as a new version. {error}"
        ) from error
    if document is None or not same:
        raise PolicyUnreadableError(
            f"{where} no longer means what it meant when it was written: it was changed in the database, or was saved "
            "by a version of holdtrue with other defaults. Save it again, as a new version"
        )
    return document


def keep_meanings(db: Database) -> None:
    """Store the meaning of versions that have none, where it is still known: before a later version's defaults differ.

    Those that are read otherwise than they were written stay as they are.
    """
    with db.read() as session:
        found = session.scalars(select(Policy.id).where(Policy.meaning.is_(None))).all()
    for policy_id in found:
        with db.write() as session, contextlib.suppress(PolicyUnreadableError):
            policy = session.get_one(Policy, policy_id)
            policy.meaning = policy.meaning or meaning(document_of(policy))


def change(old: Policy, new: Policy) -> Change:
    """Return what differs between two versions."""
    values = differences(document_of(old).canonical(), document_of(new).canonical())
    names = [f"{policy.base_model} version {policy.version}" for policy in (old, new)]
    texts = (old.document.splitlines(), new.document.splitlines())
    lines = difflib.unified_diff(*texts, fromfile=names[0], tofile=names[1], lineterm="")
    return Change(tuple(values), "\n".join(lines))


def _newest(session: Session, base_model: str) -> Policy | None:
    number = select(func.max(Policy.version)).where(Policy.base_model == base_model).scalar_subquery()
    return session.scalar(select(Policy).where(Policy.base_model == base_model, Policy.version == number))
