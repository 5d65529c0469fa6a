"""Two things at the same time: the second one sees what the first has done, and neither waits for ever."""

from __future__ import annotations

import pkgutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, event, func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from holdtrue.service import audit, auth, clock, ids, quotas, tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.api.context import Parts
from holdtrue.service.jobs import lifecycle
from holdtrue.service.policy import store as policies
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import erasure, retention
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import (
    ApiKey,
    File,
    IdempotentRequest,
    Job,
    Model,
    Organization,
    Project,
    Upload,
    UploadPart,
    WebSession,
)
from house import House, until_waiting

from .conftest import BASE, ROW

Ask = Callable[[], httpx.Response]


class Tenant:
    """The API over a database, and a tenant of it with a file and a model of its own."""

    def __init__(self, db: Database, home: Path) -> None:
        app = create_app(ServiceSettings(home=home), db=db)
        self.db, self.home = db, home
        self.parts: Parts = app.state.parts
        self.provider = TestClient(app, headers={"authorization": f"Bearer {tenancy.bootstrap(db).key}"})
        now = clock.now()
        with db.write() as session:
            organization = tenancy.create_organization(session, "Acme", "acme", now=now)
            self.project = tenancy.create_project(session, organization.id, "first", now=now).id
            key, secret = auth.create(session, project_id=self.project, name="k", role="admin", now=now)
            self.key, self.model = key.id, ids.model_name(BASE, "acme", None)
            session.add(
                Model(
                    id=ids.new("model"), name=self.model, project_id=self.project, kind="tuned", status="ready",
                    base_model=BASE, job_id=None, adapter="t-" + "0" * 32, adapter_digest="0" * 64, created_at=now,
                )
            )  # fmt: skip
        self.client = TestClient(app, headers={"authorization": f"Bearer {secret}"}, raise_server_exceptions=False)
        self.file = self.upload().json()["id"]

    def upload(self, **headers: str) -> httpx.Response:
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", ROW)}}
        return self.client.post("/v1/files", **form, headers=headers)

    def begin(self) -> str:
        body = {"bytes": len(ROW), "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
        return self.client.post("/v1/uploads", json=body).json()["id"]

    def part(self, upload: str, **headers: str) -> httpx.Response:
        return self.client.post(f"/v1/uploads/{upload}/parts", files={"data": ("p", ROW)}, headers=headers)

    def create(self, model: str = BASE) -> httpx.Response:
        return self.client.post("/v1/fine_tuning/jobs", json={"model": model, "training_file": self.file})

    def sweep(self) -> retention.Swept:
        return retention.sweep(self.db, self.parts.blobs, clock.now(), self.parts.settings)

    def erase(self) -> None:
        erasure.erase_project(self.db, self.parts.blobs, self.project, clock.now())

    def meanwhile(self, ask: Ask, change: Callable[[Session], object]) -> httpx.Response:
        """Ask while somebody has the project, who changes something once the request waits for them."""
        with ThreadPoolExecutor(1) as pool:
            with self.db.write() as session:
                quotas.lock_project(session, self.project)
                answer = pool.submit(ask)
                until_waiting(self.db, answer)
                change(session)
            return answer.result(60)


@pytest.fixture
def tenant(db: Database, tmp_path: Path) -> Tenant:
    return Tenant(db, tmp_path)


def remains(tenant: Tenant) -> list[str]:
    """Return what there is of content, in rows and in the store, and of kept answers."""
    with tenant.db.read() as session:
        found = [f"file {key}" for key in session.scalars(select(File.blob).where(File.blob.is_not(None)))]
        found += [f"name {name}" for name in session.scalars(select(File.filename).where(File.filename != ""))]
        found += [f"part {key}" for key in session.scalars(select(UploadPart.blob))]
        found += [f"answer {body}" for body in session.scalars(select(IdempotentRequest.body))]
    found += [f"stored {stored.key}" for stored in tenant.parts.blobs.stored()]
    return found + [str(path) for path in tenant.home.rglob("incoming/*") if path.is_file()]


@pytest.mark.parametrize("kind", ["file", "part", "complete"])
def test_an_upload_into_a_project_that_is_erased_meanwhile_leaves_nothing(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch, kind: str
):
    upload = tenant.begin()
    part = tenant.part(upload).json()["id"]
    put = tenant.parts.blobs.put

    def erased(*args: Any, **options: Any) -> Any:
        blob = put(*args, **options)
        tenant.erase()
        return blob

    asks: dict[str, Ask] = {
        "file": lambda: tenant.upload(**{"idempotency-key": "one"}),
        "part": lambda: tenant.part(upload, **{"idempotency-key": "one"}),
        "complete": lambda: tenant.client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [part]}),
    }
    monkeypatch.setattr(tenant.parts.blobs, "put", erased)
    answer = asks[kind]()
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert remains(tenant) == []
    with tenant.db.read() as session:
        assert session.scalars(select(Project.stored_bytes).where(Project.id == tenant.project)).one() == 0


WRITES: dict[str, Callable[[Tenant], httpx.Response]] = {
    "upload a file": lambda tenant: tenant.upload(),
    "begin an upload": lambda tenant: tenant.client.post(
        "/v1/uploads", json={"bytes": 1, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    ),
    "create a job": lambda tenant: tenant.create(),
    "delete a file": lambda tenant: tenant.client.delete(f"/v1/files/{tenant.file}"),
    "delete a model": lambda tenant: tenant.client.delete(f"/v1/models/{tenant.model}"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_key_that_is_revoked_meanwhile_does_no_more(tenant: Tenant, name: str):
    before = remains(tenant)

    def revoke(session: Session) -> None:
        auth.revoke(session, session.get_one(ApiKey, tenant.key), clock.now())

    answer = tenant.meanwhile(lambda: WRITES[name](tenant), revoke)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert remains(tenant) == before
    with tenant.db.read() as session:
        assert [session.scalar(select(func.count()).select_from(table)) for table in (Job, Upload)] == [0, 0]
        assert session.scalars(select(Model.status).where(Model.name == tenant.model)).one() == "ready"


def test_no_job_is_created_with_what_is_deleted_meanwhile(tenant: Tenant):
    gone = update(Model).where(Model.name == tenant.model).values(status="deleted", deleted_at=clock.now())
    answer = tenant.meanwhile(lambda: tenant.create(tenant.model), lambda session: session.execute(gone))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    lost = update(File).where(File.id == tenant.file).values(deleted_at=clock.now(), filename="")
    answer = tenant.meanwhile(tenant.create, lambda session: session.execute(lost))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "training_file")


def test_a_model_stays_for_a_job_that_is_created_meanwhile(tenant: Tenant):
    def create(session: Session) -> None:
        policy, project = policies.active(session, BASE), session.get_one(Project, tenant.project)
        parent = session.scalars(select(Model.id).where(Model.name == tenant.model)).one()
        assert policy is not None
        lifecycle.create(
            session, project_id=project.id, organization_id=project.organization_id, created_by=tenant.key,
            model=tenant.model, base_model=BASE, parent_model_id=parent, training_file=tenant.file,
            validation_file=None, suffix=None, seed=1, hyperparameters={}, integrations=None, policy_id=policy.id,
        )  # fmt: skip

    answer = tenant.meanwhile(lambda: tenant.client.delete(f"/v1/models/{tenant.model}"), create)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_in_use")


def test_a_part_whose_commit_lost_its_answer_keeps_its_content(tenant: Tenant):
    """The database goes away when it has committed, and before it says so."""
    upload, sessions, lost = tenant.begin(), tenant.db._sessions, []

    def lose(session: Session) -> None:
        if not lost:
            with tenant.db.read() as other:
                lost.extend(other.scalars(select(UploadPart.blob)))
            if lost:
                raise OperationalError("COMMIT", None, ConnectionError("the server closed the connection"))

    event.listen(sessions, "after_commit", lose)
    try:
        answer = tenant.part(upload, **{"idempotency-key": "one"})
    finally:
        event.remove(sessions, "after_commit", lose)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    again = tenant.part(upload, **{"idempotency-key": "one"})
    assert again.headers["idempotent-replayed"] == "true"
    with tenant.db.read() as session:
        kept = session.execute(select(UploadPart.id, UploadPart.blob)).all()
        stored = {*session.scalars(select(File.blob)), *lost}
    assert [tuple(row) for row in kept] == [(again.json()["id"], lost[0])]
    assert {each.key for each in tenant.parts.blobs.stored()} == stored
    done = tenant.client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [kept[0].id]})
    assert done.status_code == 200
    assert tenant.client.get(f"/v1/files/{done.json()['file']['id']}/content").text == ROW


def test_one_slug_at_once_is_taken_once(tenant: Tenant):
    def ask() -> httpx.Response:
        return tenant.provider.post("/v1/holdtrue/organizations", json={"name": "x", "slug": "same"})

    with ThreadPoolExecutor(1) as pool:
        with tenant.db.write() as session:
            tenancy.create_organization(session, "first", "same", now=clock.now())
            answer = pool.submit(ask)
            until_waiting(tenant.db, answer)
        found = answer.result(60)
    assert found.status_code == 400
    assert "'same' is taken" in found.json()["error"]["message"]
    with ThreadPoolExecutor(2) as pool:
        url, barrier = "/v1/holdtrue/organizations", threading.Barrier(2)

        def race(name: str) -> int:
            barrier.wait(30)
            return tenant.provider.post(url, json={"name": name, "slug": "race"}).status_code

        assert sorted(pool.map(race, ("a", "b"))) == [200, 400]
    with tenant.db.read() as session:
        assert sorted(session.scalars(select(Organization.slug))) == ["acme", "default", "race", "same"]


def test_limits_and_a_write_at_once_wait_for_each_other_in_one_order(tenant: Tenant):
    """Whoever has the project goes on to the audit log while the limits wait for the project."""
    url = f"/v1/holdtrue/projects/{tenant.project}/limits"

    def note(session: Session) -> None:
        audit.add(session, "me", "test", "x", now=clock.now())

    answer = tenant.meanwhile(lambda: tenant.provider.post(url, json={"jobs_active": 1}), note)
    assert answer.json()["limits"] == {"jobs_active": 1}


def expire(tenant: Tenant) -> None:
    """Let a sweep have a file, a kept answer and a browser's session to remove."""
    old = clock.now() - 2 * retention.DAY_SECONDS
    with tenant.db.write() as session:
        session.execute(update(File).values(expires_at=old))
        row = IdempotentRequest(project_id=tenant.project, key="old", request_digest="", body="x", created_at=old)
        session.add_all([row, WebSession(digest="d", key_id=tenant.key, csrf="c", created_at=old, expires_at=old)])


def use_answer(tenant: Tenant, session: Session) -> None:
    quotas.lock_project(session, tenant.project)
    session.get_one(IdempotentRequest, (tenant.project, "old"), with_for_update=True).created_at = clock.now()


def sign_out(tenant: Tenant, session: Session) -> None:
    session.execute(delete(WebSession))


@pytest.mark.parametrize("act", [use_answer, sign_out])
def test_a_sweep_waits_for_a_request_and_not_the_request_for_it(
    tenant: Tenant, act: Callable[[Tenant, Session], object]
):
    expire(tenant)
    with ThreadPoolExecutor(1) as pool:
        with tenant.db.write() as session:
            act(tenant, session)
            swept = pool.submit(tenant.sweep)
            until_waiting(tenant.db, swept)
            audit.add(session, tenant.key, "test", "x", now=clock.now())
        assert swept.result(60).files == 1
    with tenant.db.read() as session:
        assert audit.verify(session).broken is None


def test_an_erasure_and_a_sweep_at_once_both_end(tenant: Tenant, monkeypatch: pytest.MonkeyPatch):
    expire(tenant)
    inner = erasure._files
    with ThreadPoolExecutor(1) as pool:
        sweeps = []

        def files(*arguments: Any) -> int:
            sweeps.append(pool.submit(tenant.sweep))
            until_waiting(tenant.db, sweeps[0])
            return inner(*arguments)

        monkeypatch.setattr(erasure, "_files", files)
        tenant.erase()
        assert sweeps[0].result(60).files == 0
    assert remains(tenant) == []


@pytest.mark.parametrize(
    ("where", "status"), [("service.quotas.charge_training", 200), ("service.jobs.publish._decide", 400)]
)
def test_a_worker_and_a_request_take_project_and_job_in_one_order(
    house: House, monkeypatch: pytest.MonkeyPatch, where: str, status: int
):
    """A job is paused while its worker tells of the first steps, the first of the day, or while it publishes."""
    house.settings = house.settings.model_copy(update={"lease_seconds": 120.0})  # nobody renews it meanwhile
    job_id, client, answers = house.job(), house.api(), list[Future[httpx.Response]]()
    house.dispatch()
    inner = pkgutil.resolve_name(f"holdtrue.{where}")

    def meanwhile(*args: Any, **options: Any) -> None:
        if not answers:
            answers.append(pool.submit(client.post, f"/v1/fine_tuning/jobs/{job_id}/pause"))
            until_waiting(house.db, answers[0])
        inner(*args, **options)

    monkeypatch.setattr(f"holdtrue.{where}", meanwhile)
    with ThreadPoolExecutor(1) as pool:
        house.work()
    assert answers[0].result(60).status_code == status
    assert not any("does not answer" in text for text in house.messages(job_id))
    assert house.get(job_id).status == "succeeded"
