"""Tables of the service. One truth for both databases; migrations follow it, and a test compares the two.

Times are seconds since 1970 in UTC, as the API writes them. ``seq`` is a table's order of arrival: cursors stand on it,
so that a page is stable while rows arrive. Texts from customers are data, never paths: content lies in the object store
under its hash or a random id.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite numbers rows by itself only where the key is a plain INTEGER.
BigKey = BigInteger().with_variant(Integer, "sqlite")

JOB_STATUSES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
ENDED = ("succeeded", "failed", "cancelled")


def _where(condition: str) -> dict[str, Any]:
    """Return what keeps rows out of an index that do not meet a condition; queries name the condition as well."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


class Base(DeclarativeBase):
    """Root of the tables; constraints have names, so that migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012 (SQLAlchemy's own form)


class Organization(Base):
    """A customer. ``slug`` stands in the names of its models."""

    __tablename__ = "organizations"
    __table_args__ = (Index("ix_organizations_page", "created_at", "id"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    slug: Mapped[str] = mapped_column(String(40), unique=True)
    created_at: Mapped[int] = mapped_column(BigInteger)


class Project(Base):
    """What owns files, jobs and models: the tenant. ``limits`` overrides the service's quotas, by their names.

    ``stored_bytes`` is the sum over its files that are not deleted. Triggers keep it; nothing else writes to it.
    """

    __tablename__ = "projects"
    __table_args__ = (Index("ix_projects_page", "created_at", "id"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    limits: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[int] = mapped_column(BigInteger)
    stored_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")


class ApiKey(Base):
    """A key: its hash, never itself. ``role``: ``member``, ``admin`` of the project, or ``provider`` of the service."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("ix_api_keys_page", "project_id", "created_at", "id"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    shown: Mapped[str] = mapped_column(String(20))  # the first and last letters, to tell keys apart
    role: Mapped[str] = mapped_column(String(20))
    scopes: Mapped[list[str]]
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)
    last_used_at: Mapped[int | None] = mapped_column(BigInteger)


class WebSession(Base):
    """A signed-in browser: the hash of its cookie, and its token against forged forms."""

    __tablename__ = "web_sessions"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    csrf: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int] = mapped_column(BigInteger, index=True)


class File(Base):
    """A customer's file or a job's results. ``blob`` is its place in the object store, ``None`` once deleted."""

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_page", "project_id", "seq", **_where("deleted_at IS NULL")),
        Index("ix_files_purpose", "project_id", "purpose", "seq", **_where("deleted_at IS NULL")),
        Index("ix_files_blob", "blob", **_where("blob IS NOT NULL")),
        Index("ix_files_expires_at", "expires_at", **_where("deleted_at IS NULL")),
        Index("ix_files_unfinished", "deleted_at", **_where("deleted_at IS NOT NULL AND blob IS NOT NULL")),
    )
    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(40))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    blob: Mapped[str | None] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(20), default="processed")
    status_details: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    deleted_at: Mapped[int | None] = mapped_column(BigInteger)


class Upload(Base):
    """A file that comes in parts."""

    __tablename__ = "uploads"
    __table_args__ = (Index("ix_uploads_open", "status", "expires_at"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(40))
    mime_type: Mapped[str] = mapped_column(String(200))
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(String(20), default="pending")
    file_id: Mapped[str | None] = mapped_column(String(64))
    file_expires_after: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int] = mapped_column(BigInteger)


class UploadPart(Base):
    """One part of an upload."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    blob: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[int] = mapped_column(BigInteger)


class Policy(Base):
    """One version of a provider's policy for a base model; never changed once written.

    ``document`` is for people, ``meaning`` is what jobs run under: all values, defaults included, as the version of
    holdtrue that saved it understood them. ``digest`` is of the meaning.
    """

    __tablename__ = "policies"
    __table_args__ = (UniqueConstraint("base_model", "version"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    base_model: Mapped[str] = mapped_column(String(200))
    version: Mapped[int] = mapped_column(Integer)
    document: Mapped[str] = mapped_column(Text)  # YAML as it was given
    meaning: Mapped[str | None] = mapped_column(Text)  # None: saved before this column was there, and not read since
    digest: Mapped[str] = mapped_column(String(64))
    note: Mapped[str] = mapped_column(Text, default="")
    created_by: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)


class ActivePolicy(Base):
    """Which version is in force for a base model: one row each, so that there is never a doubt."""

    __tablename__ = "active_policies"
    base_model: Mapped[str] = mapped_column(String(200), primary_key=True)
    policy_id: Mapped[str] = mapped_column(ForeignKey("policies.id"))
    activated_by: Mapped[str] = mapped_column(String(64))
    activated_at: Mapped[int] = mapped_column(BigInteger)


class Job(Base):
    """A fine-tuning job.

    ``status`` is one of ``JOB_STATUSES``; ``wanted`` is what the customer last asked for (``run``, ``pause``,
    ``cancel``), acted on by whoever holds the job. ``fence`` grows with each lease; a write that names an older one
    changes nothing. ``attempt`` counts trainings under a policy that retrains stronger after a failed gate.
    ``held`` is set while a person's decision is waited for, ``tagged`` where the job has metadata.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_page", "project_id", "seq"),
        Index("ix_jobs_active", "project_id", "status"),
        Index("ix_jobs_tagged", "project_id", "tagged", "seq"),
        Index("ix_jobs_ready", "status", "seq"),
        CheckConstraint(f"status IN {JOB_STATUSES}", name="status"),
        CheckConstraint("wanted IN ('run', 'pause', 'cancel')", name="wanted"),
    )
    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    created_by: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(300))  # as the customer named it
    base_model: Mapped[str] = mapped_column(String(200))  # the aligned base below it
    parent_model_id: Mapped[str | None] = mapped_column(String(64))  # where it starts from a tuned model
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)
    hyperparameters: Mapped[dict[str, Any]]  # as asked for: "auto" or a number
    resolved: Mapped[dict[str, Any] | None]  # as used, once known
    integrations: Mapped[dict[str, Any] | None]  # {"wandb": {...}}; never a secret
    policy_id: Mapped[str] = mapped_column(ForeignKey("policies.id"))
    status: Mapped[str] = mapped_column(String(20))
    stage: Mapped[str | None] = mapped_column(String(40))
    wanted: Mapped[str] = mapped_column(String(10), default="run")
    held: Mapped[bool] = mapped_column(default=False)
    tagged: Mapped[bool] = mapped_column(default=False, server_default=false())
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    tries: Mapped[int] = mapped_column(Integer, default=0)  # leases since it last got further; too many fail it
    error: Mapped[dict[str, Any] | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    charged_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")  # of what it has trained
    fine_tuned_model: Mapped[str | None] = mapped_column(String(300))
    result_file: Mapped[str | None] = mapped_column(String(64))
    estimated_finish: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)
    started_at: Mapped[int | None] = mapped_column(BigInteger)
    finished_at: Mapped[int | None] = mapped_column(BigInteger)
    lease_owner: Mapped[str | None] = mapped_column(String(100))
    lease_until: Mapped[float | None]  # while queued: before this nobody takes it
    fence: Mapped[int] = mapped_column(BigInteger, default=0)


class JobMetadata(Base):
    """A job's metadata, one pair a row, so that lists can be filtered by an index.

    ``project_id`` and ``seq`` are the job's: the index has the jobs of one project with a pair in the order of a page.
    """

    __tablename__ = "job_metadata"
    __table_args__ = (Index("ix_job_metadata_pair", "project_id", "key", "value", "seq"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512))
    project_id: Mapped[str] = mapped_column(String(64))
    seq: Mapped[int] = mapped_column(BigInteger)


class JobEvent(Base):
    """What happened to a job. ``once`` names an event that must not appear twice however often its work is done."""

    __tablename__ = "job_events"
    __table_args__ = (UniqueConstraint("job_id", "once"), Index("ix_job_events_page", "job_id", "seq"))
    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    level: Mapped[str] = mapped_column(String(10))
    type: Mapped[str] = mapped_column(String(20))  # message, metrics, moderation_checks
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None]
    once: Mapped[str | None] = mapped_column(String(100))
    created_at: Mapped[int] = mapped_column(BigInteger)


class JobCheckpoint(Base):
    """A checkpoint of a job; a model only once ``model_id`` is set, after the weights hook and a gate of its own."""

    __tablename__ = "job_checkpoints"
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "step_number"),
        Index("ix_job_checkpoints_page", "job_id", "seq"),
    )
    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    step_number: Mapped[int] = mapped_column(Integer)
    name: Mapped[str] = mapped_column(String(300))
    metrics: Mapped[dict[str, Any]]
    model_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)


class JobState(Base):
    """Where another host goes on from: a run's directory in the object store, its encoded rows apart."""

    __tablename__ = "job_states"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    rows: Mapped[str | None] = mapped_column(String(200))
    rest: Mapped[str] = mapped_column(String(200))
    saved_at: Mapped[int] = mapped_column(BigInteger)


class Model(Base):
    """A model that can be asked for by name. Only ``ready`` ones are listed or served.

    ``project_id`` is ``None`` for a base model, which every tenant sees. ``adapter`` is the folder in the object store,
    named by ``adapter_digest``, which every answer of the model quotes.
    """

    __tablename__ = "models"
    __table_args__ = (
        CheckConstraint("status IN ('ready', 'blocked', 'held', 'deleted')", name="status"),
        CheckConstraint("kind IN ('base', 'tuned', 'checkpoint')", name="kind"),
        Index("ix_models_page", "project_id", "status", "seq"),
        Index("ix_models_adapters", "status", "seq", **_where("adapter IS NOT NULL")),
    )
    seq: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(300), unique=True)
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"))
    kind: Mapped[str] = mapped_column(String(20))
    status: Mapped[str] = mapped_column(String(20))
    base_model: Mapped[str] = mapped_column(String(200))
    job_id: Mapped[str | None] = mapped_column(String(64), index=True)
    adapter: Mapped[str | None] = mapped_column(String(200))
    adapter_digest: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)
    deleted_at: Mapped[int | None] = mapped_column(BigInteger)


class GateDecision(Base):
    """What the gate said of a trained adapter, and what a person said after it."""

    __tablename__ = "gate_decisions"
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "step_number"),
        Index("ix_gate_decisions_open", "action", "override", "created_at"),
    )
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    attempt: Mapped[int] = mapped_column(Integer)
    step_number: Mapped[int] = mapped_column(Integer, default=0)  # 0: the job's final adapter
    outcome: Mapped[str] = mapped_column(String(20))  # pass, fail, undecided
    report: Mapped[dict[str, Any]]
    adapter: Mapped[str] = mapped_column(String(200))
    adapter_digest: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(20))  # release, block, retrain, hold
    override: Mapped[str | None] = mapped_column(String(20))  # release or block, by a person
    override_by: Mapped[str | None] = mapped_column(String(200))
    override_reason: Mapped[str | None] = mapped_column(Text)
    override_at: Mapped[int | None] = mapped_column(BigInteger, index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)


class Receipt(Base):
    """The signed evidence of one released or blocked adapter: a DSSE envelope."""

    __tablename__ = "receipts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    model_id: Mapped[str | None] = mapped_column(String(64), index=True)
    adapter_digest: Mapped[str] = mapped_column(String(64), index=True)
    envelope: Mapped[dict[str, Any]]
    created_at: Mapped[int] = mapped_column(BigInteger)


class AuditEntry(Base):
    """Who did what. Each entry carries the hash of the one before it: a change or a gap shows."""

    __tablename__ = "audit"
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[int] = mapped_column(BigInteger)
    actor: Mapped[str] = mapped_column(String(200))
    action: Mapped[str] = mapped_column(String(60))
    subject: Mapped[str] = mapped_column(String(300), index=True)
    detail: Mapped[dict[str, Any]]
    previous: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))


class IdempotentRequest(Base):
    """The answer to a POST, kept for a day, so that the same request sent again does nothing twice."""

    __tablename__ = "idempotent_requests"
    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    status_code: Mapped[int | None] = mapped_column(Integer)  # None: still being worked on
    body: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger, index=True)
    done_at: Mapped[int] = mapped_column(BigInteger, server_default="0")  # in microseconds


class Usage(Base):
    """What a project used in a day, by counter: ``training_tokens``, ``chat_tokens``, ``requests``."""

    __tablename__ = "usage"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    counter: Mapped[str] = mapped_column(String(40), primary_key=True)
    amount: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
