"""Pages stay quick with many jobs: what they read goes by an index."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select
from starlette.testclient import TestClient

from holdtrue.service import ids, tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.schema import ApiKey, GateDecision, Job, JobEvent, Policy, Project
from holdtrue.service.web.keys import KEYS_A_PAGE, PROJECTS_SHOWN
from query_plans import plans

from ..api.conftest import BASE
from .conftest import HTML

MANY = 5000
PATHS = ["/jobs", "/keys", "/jobs?after=JOB", "/jobs/JOB", "/jobs/JOB/events", "/gate"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder: Path = tmp_path_factory.mktemp("plans")
    app = create_app(ServiceSettings(home=folder, limits={"requests_per_minute": 10**9}))
    db = app.state.parts.db
    migrations.upgrade(db)
    key = tenancy.bootstrap(db).key
    with db.write() as session:
        project = tenancy.project_of(session, None)
        jobs = [
            {
                "id": ids.new("ftjob"), "project_id": project.id, "organization_id": project.organization_id,
                "created_by": "x", "model": BASE, "base_model": BASE, "training_file": "file-x", "seed": 0,
                "hyperparameters": {}, "policy_id": session.scalar(select(Policy.id)), "status": "failed",
                "created_at": number, "wanted": "run", "held": False, "attempt": 0, "tries": 0, "fence": 0,
            }
            for number in range(MANY)
        ]  # fmt: skip
        session.execute(insert(Job), jobs)
        actions = ("release", "block", "hold", "block")
        session.execute(
            insert(GateDecision),
            [
                {
                    "id": ids.new("gate"), "job_id": job["id"], "attempt": 0, "step_number": 0, "outcome": "fail",
                    "report": {}, "adapter": "a", "adapter_digest": "0" * 64, "action": actions[number % 4],
                    "override": "block" if number % 4 == 3 else None,
                    "override_at": number if number % 4 == 3 else None, "created_at": number,
                }
                for number, job in enumerate(jobs)
            ],
        )  # fmt: skip
        session.execute(
            insert(JobEvent),
            [
                {
                    "id": ids.new("ftevent"), "job_id": jobs[-1]["id"], "level": "info", "type": "metrics",
                    "message": "m", "data": {"step": number, "train_loss": 1.0}, "created_at": number,
                }
                for number in range(MANY)
            ],
        )  # fmt: skip
    found = TestClient(app, headers=HTML)
    token = re.findall(r'name="csrf" value="([^"]+)"', found.get("/sign-in").text)[0]
    assert found.post("/sign-in", data={"csrf": token, "key": key}).url.path == "/jobs"
    found.job = jobs[-1]["id"]  # type: ignore[attr-defined]
    found.db = db  # type: ignore[attr-defined]
    yield found
    db.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_page_goes_by_an_index(client: TestClient, path: str):
    for statement, plan in plans(client, path.replace("JOB", client.job)):  # type: ignore[attr-defined]
        big = [step for step in plan if re.match(r"SCAN (?!\(subquery|anon)\w+\b(?! USING INDEX)", step)]
        assert not big, (statement, plan)


def test_a_long_training_is_thinned_where_it_lies(client: TestClient):
    page = client.get(f"/jobs/{client.job}").text  # type: ignore[attr-defined]
    steps = [int(step) for step in re.findall(r'<th scope="row" class="number">([\d,]+)</th>', page)]
    assert 100 < len(steps) <= 301
    assert steps == sorted(steps)
    assert steps[-1] == MANY - 1


def test_keys_and_projects_are_shown_in_pages(client: TestClient):
    with client.db.write() as session:  # type: ignore[attr-defined]
        project = tenancy.project_of(session, None)
        common = {"role": "member", "scopes": [], "created_at": 5, "shown": "sk-", "project_id": project.id}
        session.execute(
            insert(ApiKey),
            [{**common, "id": ids.new("key"), "name": f"k{n}", "digest": f"{n:064d}"} for n in range(KEYS_A_PAGE)],
        )
        organization = project.organization_id
        more = {"organization_id": organization, "limits": {}, "created_at": 2**40}
        session.execute(
            insert(Project), [{**more, "id": ids.new("proj"), "name": f"p{n}"} for n in range(PROJECTS_SHOWN)]
        )
    first = client.get("/keys").text
    assert first.count('/revoke"') == KEYS_A_PAGE
    assert first.count('<option value="proj-') == PROJECTS_SHOWN
    assert 'list="projects"' in first
    (older,) = re.findall(r'rel="next" href="([^"]+)"', first)
    second = client.get(html.unescape(older)).text
    assert second.count('/revoke"') == 1
    assert "Newest keys" in second
    assert 'rel="next"' not in second
    shown = [re.findall(r'action="/keys/(key-\w{24})/revoke"', page) for page in (first, second)]
    assert len({*shown[0], *shown[1]}) == KEYS_A_PAGE + 1
    for statement, plan in plans(client, html.unescape(older)):
        assert not [step for step in plan if "TEMP B-TREE" in step], (statement, plan)
