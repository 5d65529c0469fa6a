"""Lists and reads stay quick with many jobs: the database goes by an index, and reads little more than it answers.

The rows are spread as unkindly as they may be: every job has metadata, pairs are common and never meet, or common at a
neighbor's, and files of the purpose that is asked for lie behind thousands of deleted ones and results.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from starlette.testclient import TestClient

from holdtrue.service import ids, tenancy
from holdtrue.service.api import metadata
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import ApiKey, File, Job, JobEvent, JobMetadata, Model, Organization, Policy, Project
from query_plans import plans, work

from .conftest import BASE

MANY = 12_000
MOST = 8000
"""Of what lies between: jobs of a neighbor, files that were deleted."""
FEW_FILES = 30
MUCH = {"sqlite": 70_000, "postgresql": 6500}
"""What a request may make a database work: instructions, or rows. A look past what lies between is more."""


def fill(db: Database) -> dict[str, str]:
    """Fill a project with much of everything; return what the names in ``PATHS`` stand for."""
    with db.write() as session:
        project = tenancy.project_of(session, None)
        neighbor = tenancy.create_project(session, project.organization_id, "neighbor", now=1)
        policy = session.scalars(select(Policy.id).limit(1)).one()
        jobs = [
            {
                "seq": number + 1, "id": ids.new("ftjob"), "organization_id": project.organization_id,
                "project_id": project.id if number < MANY else neighbor.id,
                "created_by": "x", "model": BASE, "base_model": BASE, "training_file": "file-x", "seed": 0,
                "hyperparameters": {}, "policy_id": policy, "status": "succeeded", "created_at": number,
                "wanted": "run", "held": False, "attempt": 0, "tries": 0, "fence": 0, "tagged": True,
            }
            for number in range(MANY + MOST)
        ]  # fmt: skip
        session.execute(insert(Job), jobs)
        session.execute(insert(JobMetadata), [pair for job in jobs for pair in pairs(job, neighbor.id)])
        session.execute(insert(File), [file_row(project.id, number) for number in range(MANY + MOST)])
        newest = jobs[MANY - 1]["id"]
        session.execute(
            insert(JobEvent),
            [
                {
                    "id": ids.new("ftevent"), "job_id": newest, "level": "info", "type": "message",
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
        tenants = fill_tenants(session, project)
    if not db.is_sqlite:  # it does so by itself, a minute later
        with db.write() as session:
            session.execute(text("ANALYZE"))
    return {"JOB": newest, **tenants}


def pairs(job: dict[str, Any], neighbor: str) -> Iterator[dict[str, Any]]:
    of_job = {"job_id": job["id"], "project_id": job["project_id"], "seq": job["seq"]}
    number = job["created_at"]
    found = {"n": str(number % 1000), "common": "yes", ("odd" if number % 2 else "even"): "yes"}
    found |= {"right": "yes"} if number % 2 or number % 5000 == 0 else {}
    found |= {"late": "yes"} if number < 50 else {}
    for key, value in ({"elsewhere": "yes"} if job["project_id"] == neighbor else found).items():
        yield {**of_job, "key": key, "value": value}


def file_row(project: str, number: int) -> dict[str, Any]:
    deleted = FEW_FILES <= number < MOST
    return {
        "id": ids.new("file"), "project_id": project, "filename": "r.csv", "bytes": 1,
        "purpose": "fine-tune" if number < MOST else "fine-tune-results", "sha256": "0" * 64,
        "blob": None, "status": "processed", "created_at": number, "deleted_at": 1 if deleted else None,
    }  # fmt: skip


def fill_tenants(session: Any, project: Project) -> dict[str, str]:
    rows = range(MANY // 8)
    organizations = [{"id": ids.new("org"), "name": "o", "slug": f"o{n}", "created_at": 5} for n in rows]
    session.execute(insert(Organization), organizations)
    projects = [
        {"id": ids.new("proj"), "organization_id": each["id"], "name": "p", "limits": {}, "created_at": 5}
        for each in organizations
    ]
    session.execute(insert(Project), projects)
    keys = [
        {
            "id": ids.new("key"), "project_id": project.id, "name": "k", "digest": f"{n:064d}", "shown": "sk-",
            "role": "member", "scopes": [], "created_at": 5,
        }
        for n in rows
    ]  # fmt: skip
    session.execute(insert(ApiKey), keys)
    middle = len(rows) // 2
    return {"KEY": keys[middle]["id"], "PROJECT": projects[middle]["id"], "ORG": organizations[middle]["id"]}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    home = tmp_path_factory.mktemp("plans")
    url = ""
    if request.param == "postgresql":
        postgres = request.getfixturevalue("postgres")
        name = f"t{os.urandom(6).hex()}"
        admin = Database(postgres.url + "postgres", isolation_level="AUTOCOMMIT")
        with admin.engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.close()
        url = postgres.url + name
    app = create_app(ServiceSettings(home=home, database_url=url, limits={"requests_per_minute": 10**9}))
    db = app.state.parts.db
    migrations.upgrade(db)
    key = tenancy.bootstrap(db).key
    found = TestClient(app, headers={"authorization": f"Bearer {key}"})
    found.names = fill(db)  # type: ignore[attr-defined]
    found.db = db  # type: ignore[attr-defined]
    yield found
    db.close()


PATHS = [
    "/v1/fine_tuning/jobs",
    "/v1/fine_tuning/jobs?after=JOB",
    "/v1/fine_tuning/jobs?metadata[n]=7",
    "/v1/fine_tuning/jobs?metadata[n]=none",
    "/v1/fine_tuning/jobs?metadata[common]=yes",
    "/v1/fine_tuning/jobs?metadata[common]=yes&after=JOB",
    "/v1/fine_tuning/jobs?metadata[elsewhere]=yes",
    "/v1/fine_tuning/jobs?metadata[late]=yes",
    "/v1/fine_tuning/jobs?metadata[common]=yes&metadata[late]=yes",
    "/v1/fine_tuning/jobs?metadata[common]=yes&metadata[even]=yes",
    "/v1/fine_tuning/jobs?metadata=null",
    "/v1/fine_tuning/jobs/JOB",
    "/v1/fine_tuning/jobs/JOB/events",
    "/v1/fine_tuning/jobs/JOB/checkpoints",
    "/v1/files?limit=20",
    "/v1/files?limit=100&order=asc",
    "/v1/files?limit=20&purpose=fine-tune-results",
    "/v1/files?limit=20&purpose=fine-tune",
    "/v1/files?limit=20&purpose=batch",
    "/v1/models?limit=20",
    "/v1/models/smollm2-135m-instruct",
    "/v1/holdtrue/keys?limit=20",
    "/v1/holdtrue/projects?limit=20",
    "/v1/holdtrue/organizations?limit=20",
    "/v1/holdtrue/keys?limit=20&after=KEY",
    "/v1/holdtrue/projects?limit=20&after=PROJECT",
    "/v1/holdtrue/organizations?limit=20&after=ORG",
    "/v1/holdtrue/usage",
]
NEVER_MEET = "/v1/fine_tuning/jobs?metadata[even]=yes&metadata[odd]=yes"


def named(client: TestClient, path: str) -> str:
    """Return a path with ids in the place of names."""
    ids_of: dict[str, str] = client.names  # type: ignore[attr-defined]
    return re.sub("|".join(ids_of), lambda name: ids_of[name[0]], path)


@pytest.mark.parametrize("path", PATHS)
def test_a_read_looks_at_little_more_than_it_answers(client: TestClient, path: str):
    db: Database = client.db  # type: ignore[attr-defined]
    path = named(client, path)
    answers: list[Any] = []
    assert work(db, lambda: answers.append(client.get(path))) < MUCH[db.engine.dialect.name]
    assert answers[0].status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_a_read_goes_by_an_index(client: TestClient, path: str):
    if not client.db.is_sqlite:  # type: ignore[attr-defined]
        pytest.skip("PostgreSQL chooses by its statistics; what it looks at is counted instead")
    for statement, plan in plans(client, named(client, path)):
        big = [step for step in plan if re.match(r"USE TEMP B-TREE|SCAN (?!\w+ USING INDEX ix_\w+_page)", step)]
        assert not big, (statement, plan)


@pytest.mark.parametrize("path", PATHS)
def test_a_read_is_quick(client: TestClient, path: str):
    """Generous for a busy machine, and yet far from what looking at 12,000 rows would take."""
    path = named(client, path)
    client.get(path)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        client.get(path)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.1


def test_lists_are_not_empty_where_there_is_something(client: TestClient):
    for path, count in {
        "/v1/fine_tuning/jobs?metadata[n]=7": 12,
        "/v1/fine_tuning/jobs?metadata[elsewhere]=yes": 0,
        "/v1/fine_tuning/jobs?metadata[late]=yes&limit=100": 50,
        "/v1/fine_tuning/jobs?metadata[common]=yes&metadata[late]=yes&limit=100": 50,
        "/v1/fine_tuning/jobs?metadata[common]=yes&metadata[even]=yes&limit=100": 100,
        "/v1/fine_tuning/jobs?metadata=null": 0,
        "/v1/files?purpose=fine-tune": FEW_FILES,
        "/v1/holdtrue/projects": 1000,
    }.items():
        assert len(client.get(path).json()["data"]) == count, path


def test_pairs_that_never_meet_are_refused_after_so_many_jobs_with_a_word_on_where_to_go_on(client: TestClient):
    db: Database = client.db  # type: ignore[attr-defined]
    answers: list[Any] = []
    path, steps = NEVER_MEET, 0
    assert work(db, lambda: answers.append(client.get(NEVER_MEET))) < MUCH[db.engine.dialect.name]
    while (answer := client.get(path)).status_code == 400:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("metadata_too_common", "metadata")
        last = error["message"].partition("after=")[2].partition(" ")[0]
        path, steps = f"{NEVER_MEET}&after={last}", steps + 1
    assert answer.json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert steps == MANY // 2 // metadata.LOOKED_AT - 1  # all were looked at, the last ones without a refusal


def test_pairs_that_seldom_meet_are_all_found_by_who_goes_on(client: TestClient):
    """By the page's last job where there is one, and by what a refusal names."""
    wanted = "/v1/fine_tuning/jobs?metadata[even]=yes&metadata[right]=yes"
    path, found, refused = wanted, [], 0
    while True:
        answer = client.get(path)
        page = answer.json()
        if answer.status_code == 400:
            refused += 1
            last = page["error"]["message"].partition("after=")[2].partition(" ")[0]
        else:
            found += [job["created_at"] for job in page["data"]]
            if not page["has_more"]:
                break
            last = page["last_id"]
        path = f"{wanted}&after={last}"
    assert found == [10_000, 5000, 0]
    assert refused > 0


def test_usage_is_counted_within_an_index_and_reads_no_file(client: TestClient):
    if not client.db.is_sqlite:  # type: ignore[attr-defined]
        pytest.skip("the words are SQLite's")
    asked = list(plans(client, "/v1/holdtrue/usage"))
    found = [plan for statement, plan in asked if "count(" in statement or "sum(" in statement]
    assert len(found) == 1
    assert all("COVERING INDEX" in step for plan in found for step in plan)
    assert not [statement for statement, _ in asked if " files" in statement]
