"""Lists whole: jobs by their metadata, and what has no order of arrival, as a look at every row would find them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from holdtrue.service import auth, clock, tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.jobs import lifecycle
from holdtrue.service.policy import store as policies
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.database import Database

from .conftest import BASE

JOBS = 150


@pytest.fixture
def client(db: Database, tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(ServiceSettings(home=tmp_path, limits={"requests_per_minute": 10**9}), db=db)
    key = tenancy.bootstrap(db).key
    with TestClient(app, headers={"authorization": f"Bearer {key}"}) as found:
        yield found


def make_jobs(db: Database, project: Any, drawn: random.Random, count: int) -> list[tuple[str, dict[str, str]]]:
    made = []
    with db.write() as session:
        policy = policies.active(session, BASE)
        assert policy is not None
        for _ in range(count):
            pairs = {key: drawn.choice("xyz") for key in "abc" if drawn.random() < 0.6}
            job = lifecycle.create(
                session, project_id=project.id, organization_id=project.organization_id, created_by="x", model=BASE,
                base_model=BASE, parent_model_id=None, training_file="file-x", validation_file=None, suffix=None,
                seed=1, hyperparameters={}, integrations=None, policy_id=policy.id, metadata=pairs,
            )  # fmt: skip
            made.append((job.id, pairs))
    return made


def all_of(client: TestClient, path: str, **query: Any) -> list[str]:
    """Return the ids of all pages of a list."""
    found: list[str] = []
    while True:
        page = client.get(path, params={**query, **({"after": found[-1]} if found else {})}).json()
        found += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            return found
        assert len(page["data"]) == query["limit"]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])


def test_jobs_with_some_metadata_are_those_that_a_look_at_each_finds(client: TestClient, db: Database):
    drawn = random.Random(0)
    with db.write() as session:
        project = tenancy.project_of(session, None)
        other = tenancy.create_project(session, project.organization_id, "other", now=clock.now())
    made: list[tuple[str, dict[str, str]]] = []
    for _ in range(3):  # in turns with another project's
        made += make_jobs(db, project, drawn, JOBS // 3)
        make_jobs(db, other, drawn, JOBS // 3)
    values = ("x", "y", "none", None)
    for a, b, c in itertools.product(values, values, values[1:]):
        wanted = {key: value for key, value in zip("abc", (a, b, c), strict=True) if value is not None}
        expected = [job for job, pairs in reversed(made) if wanted.items() <= pairs.items()]
        assert all_of(client, "/v1/fine_tuning/jobs", limit=7, **{f"metadata[{k}]": v for k, v in wanted.items()}) == (
            expected
        )
    none = [job for job, pairs in reversed(made) if not pairs]
    assert len(none) > 3
    assert all_of(client, "/v1/fine_tuning/jobs", limit=3, metadata="null") == none


def test_keys_projects_and_organizations_come_in_pages(client: TestClient, db: Database):
    """Many of one second, so that their order within it counts."""
    with db.write() as session:
        project = tenancy.project_of(session, None)
        for number in range(5):
            made = tenancy.create_organization(session, f"o{number}", f"o{number}", now=10)
            tenancy.create_project(session, made.id, f"p{number}", now=10)
            auth.create(session, project_id=project.id, name=f"k{number}", role="provider", now=10 + number // 3)
            auth.create(session, project_id=project.id, name=f"m{number}", role="admin", now=10 + number // 3)
        stranger = auth.create(
            session, project_id=tenancy.create_project(session, made.id, "s", now=9).id, name="s", now=9
        )
        secret = auth.create(session, project_id=project.id, name="a", role="admin", now=10).secret
    for name, count in (("keys", 12), ("projects", 7), ("organizations", 6)):
        path = f"/v1/holdtrue/{name}"
        whole = client.get(path).json()
        ids = [each["id"] for each in whole["data"]]
        assert len(ids) == len(set(ids)) == count
        assert whole["has_more"] is False
        times = [each["created_at"] for each in whole["data"]]
        assert times == sorted(times, reverse=name == "keys")
        for limit in (1, 2, 5):
            assert all_of(client, path, limit=limit) == ids
        for wrong in ("nothing", "a\0b", stranger.row.id if name == "keys" else "proj-" + "0" * 24):
            answer = client.get(path, params={"after": wrong})
            assert answer.status_code == 404
            assert answer.json()["error"]["param"] == "after"
        assert client.get(path, params={"limit": 1001}).status_code == 400
    admins = {"authorization": f"Bearer {secret}"}
    shown = client.get("/v1/holdtrue/keys", headers=admins).json()["data"]
    assert [each["role"] for each in shown] == ["admin"] * 6
    hidden = next(each["id"] for each in client.get("/v1/holdtrue/keys").json()["data"] if each["role"] == "provider")
    assert client.get("/v1/holdtrue/keys", params={"after": hidden}, headers=admins).status_code == 404
