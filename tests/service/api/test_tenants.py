"""Another tenant's object is not there, on any route and in any field; and no key may do more than it says."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text

from holdtrue.service import auth, clock, ids
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.schema import (
    ApiKey,
    Base,
    GateDecision,
    JobCheckpoint,
    JobEvent,
    Model,
    Receipt,
    UploadPart,
)

from .conftest import BASE, ROW, Server

OPEN = {"/healthz", "/readyz", "/metrics"}
SECRET = "the-owners-own-text"


@pytest.fixture(scope="module")
def owned(server: Server, file_id: str) -> dict[str, str]:
    """One object of every kind that the first tenant owns, by the name that routes give its id."""
    with server.client() as client:
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file_id, suffix=SECRET, metadata={"k": SECRET})
        upload = client.uploads.create(bytes=3, filename=SECRET, mime_type="text/jsonl", purpose="fine-tune")
        part = client.uploads.parts.create(upload.id, data=b"abc")
        file = client.files.create(file=(SECRET, ROW.encode()), purpose="fine-tune")
    now = clock.now()
    name = ids.model_name(BASE, "default", SECRET)
    with server.db.write() as session:
        key = session.scalars(select(ApiKey).order_by(ApiKey.created_at)).first()
        assert key is not None
        model = Model(
            id=ids.new("model"), name=name, project_id=key.project_id, kind="tuned", status="ready", base_model=BASE,
            job_id=job.id, adapter="a", adapter_digest="0" * 64, created_at=now, deleted_at=None,
        )  # fmt: skip
        event = JobEvent(
            id=ids.new("ftevent"), job_id=job.id, level="info", type="moderation_checks", message=SECRET,
            data={"figure": float("nan"), "passed": True}, once=None, created_at=now,
        )  # fmt: skip
        checkpoint = JobCheckpoint(
            id=ids.new("ftckpt"), job_id=job.id, step_number=3, name=name + ":ckpt-step-3",
            metrics={"step": 3, "train_loss": 1.5, "ours": 2}, model_id=None, created_at=now,
        )  # fmt: skip
        receipt = Receipt(
            id=ids.new("receipt"), job_id=job.id, model_id=None, adapter_digest="0" * 64,
            envelope={"payload": SECRET}, created_at=now,
        )  # fmt: skip
        session.add_all([model, event, checkpoint, receipt])
    return {
        "file_id": file.id,
        "upload_id": upload.id,
        "part_id": part.id,
        "fine_tuning_job_id": job.id,
        "model": name,
        "key_id": key.id,
        "project_id": key.project_id,
        "event": event.id,
        "checkpoint": checkpoint.id,
    }


def routes() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(ServiceSettings(home=Path(folder)))
        for path, operations in app.openapi()["paths"].items():
            for method in operations:
                yield method.upper(), path
        app.state.parts.db.close()


ROUTES = sorted(routes())
BODIES: dict[str, dict[str, Any]] = {
    "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part-" + "a" * 24]}},
    "/v1/uploads/{upload_id}/parts": {"files": {"data": b"abc"}},
    "/v1/holdtrue/keys/{key_id}/rotate": {"json": {}},
    "/v1/holdtrue/projects/{project_id}/limits": {"json": {}},
}


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if "{" in route[1]])
def test_a_stranger_finds_nothing(server: Server, owned: dict[str, str], strangers_key: str, method: str, path: str):
    def ask(key: str, values: dict[str, str]) -> httpx.Response:
        url = server.url.removesuffix("/v1") + path.replace(":path", "").format(**values)
        return httpx.request(method, url, headers={"authorization": f"Bearer {key}"}, **BODIES.get(path, {}))

    absent = {
        "file_id": "file-" + "0" * 24,
        "upload_id": "upload-" + "0" * 24,
        "fine_tuning_job_id": "ftjob-" + "0" * 24,
        "model": ids.model_name(BASE, "default", SECRET, tag="00000000"),
        "key_id": "key-" + "0" * 24,
        "project_id": "proj-" + "0" * 24,
    }
    theirs, nothing = ask(strangers_key, owned), ask(strangers_key, absent)
    assert theirs.status_code == nothing.status_code == 404
    # What differs is the name that was asked for, and nothing else.
    told = [answer.json()["error"] for answer in (theirs, nothing)]
    for values, error in zip((owned, absent), told, strict=True):
        for value in values.values():
            error["message"] = error["message"].replace(value[:80], "X")
    assert told[0] == told[1]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_wants_a_key(server: Server, owned: dict[str, str], method: str, path: str):
    url = server.url.removesuffix("/v1") + path.replace(":path", "").format(**owned)
    for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"authorization": "Basic abc"}):
        answer = httpx.request(method, url, headers=headers)
        assert answer.status_code == (200 if path in OPEN else 401), path
        if path not in OPEN:
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert answer.headers["x-request-id"]


def test_lists_and_cursors_show_nothing_of_others(server: Server, owned: dict[str, str], strangers_key: str):
    headers = {"authorization": f"Bearer {strangers_key}"}
    for method, path in ROUTES:
        if method == "GET" and "{" not in path and path.startswith("/v1/"):
            answer = httpx.get(server.url.removesuffix("/v1") + path, headers=headers)
            assert SECRET not in answer.text
            assert not [value for name, value in owned.items() if value in answer.text and name != "model"]
    for path, cursor in (
        ("files", owned["file_id"]),
        ("fine_tuning/jobs", owned["fine_tuning_job_id"]),
        ("models", owned["model"]),
    ):
        answer = httpx.get(f"{server.url}/{path}", params={"after": cursor}, headers=headers)
        assert answer.status_code == 404


def test_what_is_anothers_cannot_be_named_in_a_body(server: Server, owned: dict[str, str], strangers_key: str):
    with server.client(strangers_key) as client:
        own = client.files.create(file=("a.jsonl", ROW.encode()), purpose="fine-tune").id
    for change in (
        {"training_file": owned["file_id"]},
        {"validation_file": owned["file_id"]},
        {"model": owned["model"]},
    ):
        answer = httpx.post(
            f"{server.url}/fine_tuning/jobs",
            json={"model": BASE, "training_file": own, **change},
            headers={"authorization": f"Bearer {strangers_key}"},
        )
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == next(iter(change))


def test_the_owner_sees_all_of_it(server: Server, owned: dict[str, str]):
    with server.client() as client:
        jobs = client.fine_tuning.jobs
        newest = jobs.list_events(owned["fine_tuning_job_id"]).data[0]
        assert newest.id == owned["event"]
        assert newest.type == "moderation_checks"
        assert newest.data == {"figure": None, "passed": True}
        checkpoint = jobs.checkpoints.list(owned["fine_tuning_job_id"]).data[0]
        assert (checkpoint.id, checkpoint.step_number) == (owned["checkpoint"], 3)
        assert checkpoint.metrics.train_loss == 1.5
        assert owned["model"] in [model.id for model in client.models.list()]
        assert client.models.retrieve(owned["model"]).owned_by == "default"
        receipt = client.get(f"/holdtrue/jobs/{owned['fine_tuning_job_id']}/receipt", cast_to=object)
        assert receipt["envelope"] == {"payload": SECRET}  # type: ignore[index]


@pytest.mark.parametrize("status", ["blocked", "held", "deleted"])
def test_a_model_that_is_not_released_is_not_there(server: Server, owned: dict[str, str], file_id: str, status: str):
    name = ids.model_name(BASE, "default", None)
    with server.db.write() as session:
        session.add(
            Model(
                id=ids.new("model"),
                name=name,
                project_id=owned["project_id"],
                kind="tuned",
                status=status,
                base_model=BASE,
                job_id=None,
                adapter="a",
                adapter_digest="1" * 64,
                created_at=1,
                deleted_at=None,
            )
        )
    headers = {"authorization": f"Bearer {server.key}"}
    assert name not in httpx.get(f"{server.url}/models", headers=headers).text
    assert httpx.get(f"{server.url}/models/{name}", headers=headers).status_code == 404
    assert httpx.delete(f"{server.url}/models/{name}", headers=headers).status_code == 404
    job = {"model": name, "training_file": file_id}
    assert httpx.post(f"{server.url}/fine_tuning/jobs", json=job, headers=headers).status_code == 404


def test_scopes_and_roles(server: Server, owned: dict[str, str]):
    def key(role: str, *scopes: str) -> dict[str, str]:
        with server.db.write() as session:
            made = auth.create(
                session, project_id=owned["project_id"], name="x", role=role, scopes=scopes, now=clock.now()
            )
        return {"authorization": f"Bearer {made.secret}"}

    reader = key("member", "files.read")
    assert httpx.get(f"{server.url}/files", headers=reader).status_code == 200
    for method, path in (("DELETE", f"/files/{owned['file_id']}"), ("GET", "/models"), ("GET", "/fine_tuning/jobs")):
        answer = httpx.request(method, server.url + path, headers=reader)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "missing_scope"
    assert httpx.get(f"{server.url}/holdtrue/keys", headers=key("member")).status_code == 403
    admin = key("admin")
    assert httpx.get(f"{server.url}/holdtrue/keys", headers=admin).status_code == 200
    for path in ("audit", "projects", "organizations"):
        assert httpx.get(f"{server.url}/holdtrue/{path}", headers=admin).status_code == 404
    raised = httpx.post(f"{server.url}/holdtrue/keys", json={"name": "x", "role": "provider"}, headers=admin)
    assert raised.status_code == 403
    narrow = key("admin", "admin", "files.read")
    raised = httpx.post(f"{server.url}/holdtrue/keys", json={"name": "x", "scopes": ["chat"]}, headers=narrow)
    assert raised.status_code == 403
    assert httpx.delete(f"{server.url}/holdtrue/keys/{owned['key_id']}", headers=admin).status_code == 404


def test_a_keys_life(server: Server):
    url, headers = f"{server.url}/holdtrue/keys", {"authorization": f"Bearer {server.key}"}

    def works(secret: str) -> bool:
        answer = httpx.get(f"{server.url}/models", headers={"authorization": f"Bearer {secret}"})
        assert answer.status_code in (200, 401)
        return answer.status_code == 200

    made = httpx.post(url, json={"name": "k", "expires_in": 60}, headers=headers).json()
    assert works(made["key"])
    listed = httpx.get(url, headers=headers)
    assert made["key"] not in listed.text
    assert made["id"] in listed.text
    turned = httpx.post(f"{url}/{made['id']}/rotate", json={"grace": 600}, headers=headers).json()
    assert works(made["key"])
    assert works(turned["key"])
    again = httpx.post(f"{url}/{turned['id']}/rotate", json={}, headers=headers).json()
    assert not works(turned["key"])
    assert works(again["key"])
    httpx.delete(f"{url}/{again['id']}", headers=headers)
    assert not works(again["key"])
    with server.db.write() as session:
        session.get_one(ApiKey, made["id"]).expires_at = clock.now()
    assert not works(made["key"])
    with server.db.read() as session:
        stored = repr(session.execute(text("SELECT * FROM api_keys")).all())
    assert made["key"] not in stored
    assert auth.digest(made["key"]) in stored
    assert not [path for path in server.home.glob("service.db*") if made["key"].encode() in path.read_bytes()]
    audited = httpx.get(f"{server.url}/holdtrue/audit", headers=headers).json()["data"]
    assert {"key.create", "key.rotate", "key.revoke"} <= {entry["action"] for entry in audited}
    assert made["key"] not in json.dumps(audited)


def test_no_key_makes_one_that_works_longer(server: Server):
    url = f"{server.url}/holdtrue/keys"

    def ask(key: str, path: str = "", **wish: object) -> dict[str, Any]:
        return httpx.post(url + path, json=wish, headers={"authorization": f"Bearer {key}"}).json()

    def admin(**wish: object) -> dict[str, Any]:
        return ask(server.key, name="k", role="admin", **wish)

    lasting, brief = admin(), admin(expires_in=60)
    assert lasting["expires_at"] is None
    for wish in ({}, {"expires_in": 600}):
        assert ask(brief["key"], name="k", **wish)["expires_at"] == brief["expires_at"]
        assert ask(lasting["key"], name="k", **wish)["expires_at"] != brief["expires_at"]
    assert ask(brief["key"], f"/{lasting['id']}/rotate", grace=600)["expires_at"] == brief["expires_at"]
    assert ask(brief["key"], f"/{brief['id']}/rotate", grace=30)["expires_at"] == brief["expires_at"]
    with server.db.read() as session:
        ends = session.get_one(ApiKey, brief["id"]).revoked_at
    assert ask(brief["key"], name="k")["expires_at"] == ends  # it ends with its grace
    ask(server.key, f"/{brief['id']}/rotate", grace=2_592_000)
    with server.db.read() as session:
        assert session.get_one(ApiKey, brief["id"]).revoked_at == ends


def test_tables_with_an_owner_are_all_tried(owned: dict[str, str]):
    """Whoever adds a table that belongs to a tenant adds it here as well."""
    known = {
        "projects", "api_keys", "web_sessions", "files", "uploads", "jobs", "models", "usage", "organizations",
        "policies", "active_policies", "audit", "idempotent_requests", "job_metadata",
        JobEvent.__tablename__, JobCheckpoint.__tablename__, Receipt.__tablename__, UploadPart.__tablename__,
        GateDecision.__tablename__, "job_states",
    }  # fmt: skip
    assert set(Base.metadata.tables) == known
