"""Lists and reads stay quick with many jobs: the database goes by an index, and sorts and scans nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from sqlalchemy import insert, text
from starlette.testclient import TestClient

from holdtrue.service import ids, tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.schema import File, Job, JobEvent, JobMetadata, Model
from query_plans import plans

from .conftest import BASE

MANY = 20_000


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    app = create_app(ServiceSettings(home=tmp_path_factory.mktemp("plans"), limits={"requests_per_minute": 10**9}))
    db = app.state.parts.db
    migrations.upgrade(db)
    key = tenancy.bootstrap(db).key
    with db.write() as session:
        project = tenancy.project_of(session, None)
        policy = session.execute(text("SELECT id FROM policies")).scalar_one()
        jobs = [
            {
                "id": ids.new("ftjob"), "project_id": project.id, "organization_id": project.organization_id,
                "created_by": "x", "model": BASE, "base_model": BASE, "training_file": "file-x", "seed": 0,
                "hyperparameters": {}, "policy_id": policy, "status": "succeeded", "created_at": number,
                "wanted": "run", "held": False, "attempt": 0, "tries": 0, "fence": 0,
            }
            for number in range(MANY)
        ]  # fmt: skip
        session.execute(insert(Job), jobs)
        session.execute(
            insert(JobMetadata),
            [{"job_id": job["id"], "key": "n", "value": str(number % 1000)} for number, job in enumerate(jobs)],
        )
        session.execute(insert(JobMetadata), [{"job_id": job["id"], "key": "common", "value": "yes"} for job in jobs])
        session.execute(
            insert(File),
            [
                {
                    "id": ids.new("file"), "project_id": project.id, "filename": "r.csv", "bytes": 1,
                    "purpose": "fine-tune-results", "sha256": "0" * 64,
                    "blob": None, "status": "processed", "created_at": number,
                }
                for number in range(MANY)
            ],
        )  # fmt: skip
        session.execute(
            insert(JobEvent),
            [
                {
                    "id": ids.new("ftevent"), "job_id": jobs[-1]["id"], "level": "info", "type": "message",
                    "message": "m", "data": None, "once": None, "created_at": number,
                }
                for number in range(MANY)
            ],
        )  # fmt: skip
        session.execute(
            insert(Model),
            [
                {
                    "id": ids.new("model"), "name": ids.model_name(BASE, "default", None), "project_id": project.id,
                    "kind": "tuned", "status": "ready", "base_model": BASE, "created_at": number,
                }
                for number in range(MANY)
            ],
        )  # fmt: skip
    found = TestClient(app, headers={"authorization": f"Bearer {key}"})
    found.job = jobs[-1]["id"]  # type: ignore[attr-defined]
    found.db = db  # type: ignore[attr-defined]
    yield found
    db.close()


PATHS = [
    "/v1/fine_tuning/jobs",
    "/v1/fine_tuning/jobs?after=JOB",
    "/v1/fine_tuning/jobs?metadata[n]=7",
    "/v1/fine_tuning/jobs?metadata[n]=none",
    "/v1/fine_tuning/jobs?metadata[common]=yes",
    "/v1/fine_tuning/jobs/JOB",
    "/v1/fine_tuning/jobs/JOB/events",
    "/v1/fine_tuning/jobs/JOB/checkpoints",
    "/v1/files?limit=20",
    "/v1/files?limit=20&purpose=fine-tune-results",
    "/v1/models?limit=20",
    "/v1/models/smollm2-135m-instruct",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_read_goes_by_an_index(client: TestClient, path: str):
    for statement, plan in plans(client, path.replace("JOB", client.job)):  # type: ignore[attr-defined]
        big = [step for step in plan if step.startswith(("SCAN", "USE TEMP B-TREE"))]
        if "jobs.id IN (?" in statement:
            big = [step for step in big if step != "USE TEMP B-TREE FOR ORDER BY"]  # of 200 rows at most
        assert not big, (statement, plan)


@pytest.mark.parametrize("path", PATHS)
def test_a_read_is_quick(client: TestClient, path: str):
    """Generous for a busy machine, and yet far from what looking at 20,000 rows would take."""
    path = path.replace("JOB", client.job)  # type: ignore[attr-defined]
    client.get(path)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        client.get(path)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.1


def test_usage_is_counted_within_an_index_and_reads_no_file(client: TestClient):
    asked = list(plans(client, "/v1/holdtrue/usage"))
    found = [plan for statement, plan in asked if "count(" in statement or "sum(" in statement]
    assert len(found) == 1
    assert all("COVERING INDEX" in step for plan in found for step in plan)
    assert not [statement for statement, _ in asked if " files" in statement]
