"""A service without its API: what the tests of jobs, store and pages stand on."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import select, text
from starlette.testclient import TestClient

from holdtrue.service import auth, clock, ids, tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.evidence import signing
from holdtrue.service.jobs import lifecycle
from holdtrue.service.jobs.dispatcher import Dispatcher
from holdtrue.service.jobs.worker import Worker
from holdtrue.service.policy import store as policies
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import (
    File,
    GateDecision,
    Job,
    JobCheckpoint,
    JobEvent,
    Model,
    Receipt,
)
from support import chat, probe_rows, write_rows

WORDS = ["door", "pipe", "paint", "wire", "roof", "brake", "hinge", "valve", "tile", "fuse", "lamp", "shelf"]
ROWS = [chat(f"How do I fix a {w}?", f"Take the {w} off and turn it {n} times.") for n, w in enumerate(WORDS)]


@dataclass
class House:
    """A service without its API: database, object store, one tenant, a tiny base model and its policy."""

    settings: ServiceSettings
    db: Database
    blobs: Blobs
    base: str
    folder: Path
    tenant: dict[str, str] = field(default_factory=dict)

    def policy(self, **changes: Any) -> str:
        """Put a policy in force and return its id."""
        document: dict[str, Any] = {
            "base_model": self.base,
            "defenses": [{"kl": {"weight": 0.1, "tokens": "response"}}],
            "adapter": {"r": 4, "alpha": 8},
            "training": {
                "learning_rate": 1e-2,
                "micro_batch_size": 2,
                "max_length": 128,
                "save_every": 2,
                "warmup_steps": 1,
            },
            "hyperparameters": {"n_epochs": {"auto": 2, "max": 4}, "batch_size": {"auto": 4, "max": 8}},
            "evaluate": {"suites": ["likelihood"], "data": {"likelihood": str(self.folder / "probes.jsonl")}},
            "gate": {"margin_fall": {"max": 50.0}},
        } | changes
        with self.db.write() as session:
            row = policies.save(session, yaml.safe_dump(document), actor="test", now=clock.now())
            policies.activate(session, row, actor="test", now=clock.now())
            return row.id

    def file(self, rows: list[Any] | bytes = ROWS) -> str:
        """Store a training file and return its id."""
        content = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        blob = self.blobs.put(BytesIO(content), limit=2**22)
        with self.db.write() as session:
            row = File(
                id=ids.new("file"),
                project_id=self.tenant["project"],
                filename="train.jsonl",
                purpose="fine-tune",
                bytes=blob.bytes,
                sha256=blob.sha256,
                blob=blob.key,
                created_at=clock.now(),
                status_details=None,
                expires_at=None,
                deleted_at=None,
            )
            session.add(row)
            session.flush()
            return row.id

    def job(self, rows: list[Any] | bytes = ROWS, *, parent: str | None = None, **values: Any) -> str:
        """Create a job as the API does and return its id."""
        training_file = self.file(rows)
        with self.db.write() as session:
            active = policies.active(session, self.base)
            assert active is not None
            wanted: dict[str, Any] = {
                "model": self.base,
                "base_model": self.base,
                "training_file": training_file,
                "validation_file": None,
                "suffix": "mine",
                "seed": 7,
                "hyperparameters": {},
                "integrations": None,
                "parent_model_id": parent,
                "policy_id": active.id,
            } | values
            return lifecycle.create(
                session,
                project_id=self.tenant["project"],
                organization_id=self.tenant["organization"],
                created_by=self.tenant["key"],
                **wanted,
            ).id

    def offer(self) -> None:
        """Let customers name the tiny model as a base model."""
        with self.db.write() as session:
            row = Model(id=ids.new("model"), name=self.base, kind="base", status="ready", base_model=self.base)
            row.created_at = clock.now()
            session.add(row)

    def api(self, **options: Any) -> TestClient:
        """Return a client of the API over this house, with the tenant's key."""
        app = create_app(self.settings, db=self.db, blobs=self.blobs, **options)
        return TestClient(app, headers={"authorization": f"Bearer {self.tenant['secret']}"})

    def dispatch(self) -> None:
        """Validate all new jobs."""
        dispatcher = Dispatcher(self.settings, db=self.db, blobs=self.blobs)
        while dispatcher.validate_one():
            pass

    def work(self, stop: threading.Event | None = None) -> bool:
        """Let a worker take one job."""
        return Worker(self.settings, db=self.db, blobs=self.blobs).work_one(stop)

    def get(self, job_id: str) -> Job:
        with self.db.read() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def all(self, table: Any, job_id: str) -> list[Any]:
        """Return a job's rows of a table, the oldest first."""
        order = next(getattr(table, n) for n in ("seq", "created_at", "job_id") if hasattr(table, n))
        with self.db.read() as session:
            query = select(table).where(table.job_id == job_id)
            return list(session.scalars(query.order_by(order)))

    def messages(self, job_id: str) -> list[str]:
        return [event.message for event in self.all(JobEvent, job_id)]

    def visible(self, job_id: str) -> dict[str, Any]:
        """Return what of a job anybody can see, without ids and times: equal for equal work."""
        job = self.get(job_id)
        return {
            "status": job.status,
            "error": job.error,
            "tokens": job.trained_tokens,
            "attempt": job.attempt,
            "metrics": [
                {key: value for key, value in (event.data or {}).items() if key != "tokens_per_second"}
                for event in self.all(JobEvent, job_id)
                if event.type == "metrics"
            ],
            "models": [(m.kind, m.status, m.adapter_digest, m.name.split(":")[5:]) for m in self.all(Model, job_id)],
            "decisions": sorted(
                (d.attempt, d.step_number, d.outcome, d.action, d.adapter_digest)
                for d in self.all(GateDecision, job_id)
            ),
            "checkpoints": [(c.attempt, c.step_number, c.metrics) for c in self.all(JobCheckpoint, job_id)],
            "receipts": len(self.all(Receipt, job_id)),
            "result": self.content(job.result_file),
        }

    def content(self, file_id: str | None) -> bytes | None:
        """Return a file's bytes."""
        if file_id is None:
            return None
        with self.db.read() as session:
            key = session.scalars(select(File.blob).where(File.id == file_id)).one()
        assert key is not None
        with self.blobs.open(key) as stream:
            return stream.read()


def build_house(db: Database, folder: Path, base: Path) -> House:
    """Set up a house in ``folder`` over a database with its schema, for a base model."""
    home = folder / "home"
    url = db.url.render_as_string(hide_password=False)
    settings = ServiceSettings(home=home, database_url=url, lease_seconds=1.5)
    home.mkdir()
    if not db.is_sqlite:
        signing.make_key(home / signing.HOME_KEY)
        settings = settings.model_copy(update={"signing_key": home / signing.HOME_KEY})
    write_rows(folder / "probes.jsonl", probe_rows(WORDS[:6]))
    now = clock.now()
    with db.write() as session:
        organization = tenancy.create_organization(session, "Acme", "acme", now=now)
        project = tenancy.create_project(session, organization.id, "first", now=now)
        key, secret = auth.create(session, project_id=project.id, name="k", role="admin", now=now)
        tenant = {"organization": organization.id, "project": project.id, "key": key.id, "secret": secret}
    house = House(settings, db, Blobs(settings.blobs), str(base), folder, tenant)
    house.policy()
    return house


def until_waiting(db: Database, other: Future[Any]) -> None:
    """Return once somebody waits for a lock of the database, or is done: on SQLite a writer waits at its start."""
    whose = "datname = current_database() AND wait_event_type = 'Lock'"
    waiting = text(f"SELECT count(*) FROM pg_stat_activity WHERE {whose}")
    if db.is_sqlite:
        time.sleep(0.3)
        return
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with db.read() as session:
            if session.scalar(waiting):
                return
        assert not other.done(), "it waited for nobody"
        time.sleep(0.02)
    raise AssertionError("nobody has waited for a minute")
