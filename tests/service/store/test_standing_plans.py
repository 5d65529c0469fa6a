"""What runs every second or minute looks at what it has to do, and not at all that ever was.

On SQLite it holds the lock that every writer waits for. Here nothing is to be done, among thousands of rows that were.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from holdtrue.service import clock, ids, tenancy
from holdtrue.service.jobs import leases
from holdtrue.service.jobs.dispatcher import Dispatcher
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations, retention
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Base, File, Job, JobState, Model, Policy, Upload
from query_plans import plans_of, work

MANY = 10_000
NOW = 10**9
BIG = set(Base.metadata.tables) - {"upload_parts", "job_states"}
"""All but the tables of what is under way: nothing stays in those."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServiceSettings:
    folder: Path = tmp_path_factory.mktemp("standing")
    return ServiceSettings(home=folder)


@pytest.fixture(scope="module")
def db(settings: ServiceSettings) -> Iterator[Database]:
    found = Database(settings.database)
    migrations.upgrade(found)
    tenancy.bootstrap(found)
    with found.write() as session:
        project = tenancy.project_of(session, None)
        policy = session.scalars(select(Policy.id).limit(1)).one()
        for table, row in rows(project.id, project.organization_id, policy):
            names = [f"{row['id']}{number:024d}" for number in range(MANY)]
            more = [{"id": name, "name": name} if table is Model else {"id": name} for name in names]
            session.execute(insert(table), [{**row, **each} for each in more])
        # Jobs under way, each with a state to go on from.
        base = next(row for table, row in rows(project.id, project.organization_id, policy) if table is Job)
        running = [
            {**base, "id": ids.new("ftjob"), "status": "running", "lease_until": clock.now() + 600} for _ in range(5)
        ]
        session.execute(insert(Job), running)
        session.execute(
            insert(JobState),
            [{"job_id": job["id"], "attempt": 0, "rows": "b-x", "rest": "b-y", "saved_at": 1} for job in running],
        )
    yield found
    found.close()


def rows(project: str, organization: str, policy: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    job = {
        "organization_id": organization, "project_id": project, "created_by": "x", "model": "b", "base_model": "b",
        "training_file": "file-x", "seed": 0, "hyperparameters": {}, "policy_id": policy, "created_at": 1,
        "wanted": "run", "held": False, "attempt": 0, "tries": 0, "fence": 0,
    }  # fmt: skip
    yield Job, {**job, "id": "a", "status": "succeeded"}
    yield Job, {**job, "id": "b", "status": "failed"}
    yield Job, {**job, "id": "c", "status": "paused"}
    file = {
        "project_id": project, "filename": "f", "purpose": "fine-tune", "bytes": 1, "sha256": "", "status": "processed",
        "created_at": 1,
    }  # fmt: skip
    yield File, {**file, "id": "live", "blob": "b-1", "expires_at": 2 * NOW}
    yield File, {**file, "id": "gone", "blob": None, "expires_at": 1, "deleted_at": 2}
    upload = {"project_id": project, "filename": "f", "purpose": "batch", "mime_type": "", "bytes": 1, "created_at": 1}
    yield Upload, {**upload, "id": "u", "status": "completed", "expires_at": 1}
    model = {"project_id": project, "kind": "tuned", "base_model": "b", "created_at": 1}
    yield Model, {**model, "id": "m", "status": "ready", "adapter": "t-1"}
    yield Model, {**model, "id": "d", "status": "deleted", "adapter": None, "deleted_at": 2}


def acts(db: Database, settings: ServiceSettings) -> dict[str, Any]:
    blobs = Blobs(settings.blobs)
    return {
        "take": lambda: leases.take(db, "w", 600),
        "validate": Dispatcher(settings, db=db, blobs=blobs).validate_one,
        "sweep": lambda: retention.sweep(db, blobs, NOW, settings, orphans=False),
    }


@pytest.mark.parametrize("name", ["take", "validate", "sweep"])
def test_what_stands_still_is_not_looked_at(db: Database, settings: ServiceSettings, name: str):
    act = acts(db, settings)[name]
    done = act()
    assert not done or not any(done)
    for statement, plan in plans_of(db, act, ("SELECT", "UPDATE", "DELETE")):
        big = [step for step in plan if (found := re.match(r"SCAN (\w+)", step)) and found[1] in BIG]
        assert not big, (statement, plan)
    assert work(db, act) < 5000
