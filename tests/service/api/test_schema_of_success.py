"""Schemathesis with real ids in each request: what a success answers is as the document says, on every route."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from holdtrue.service import auth, clock, ids
from holdtrue.service.api.app import create_app
from holdtrue.service.quotas import Limits
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Model
from holdtrue.serving.engine import TransformersEngine
from house import House, build_house

from .conftest import ROW
from .test_schema import CHECKS
from .test_tenants import ROUTES

LISTS = ("after", "before", "project_id")
"""Queries that name something: left out, since the document cannot say what is there."""


@dataclass
class Place:
    """An API with all that its routes can be asked for: a trained job, a model that answers, files, keys."""

    app: FastAPI
    house: House
    client: TestClient
    document: Any
    job: str

    def post(self, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        answer = self.client.post(f"/v1/{path}", json=body, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def file(self) -> str:
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", ROW * 12)}}
        return self.client.post("/v1/files", **form).json()["id"]

    def new_job(self) -> str:
        return self.post("fine_tuning/jobs", {"model": self.house.base, "training_file": self.file()})["id"]

    def paused_job(self) -> str:
        job_id = self.new_job()
        self.post(f"fine_tuning/jobs/{job_id}/pause")
        return job_id

    def upload(self) -> str:
        wanted = {"bytes": 3, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
        return self.post("uploads", wanted)["id"]

    def key(self) -> str:
        return self.post("holdtrue/keys", {"name": "k"})["id"]

    def project(self) -> str:
        wanted = {"name": "p", "organization_id": self.house.tenant["organization"]}
        return self.post("holdtrue/projects", wanted)["id"]

    def model(self) -> str:
        name = ids.model_name("tiny", "acme", None)
        values = {"project_id": self.house.tenant["project"], "kind": "tuned", "status": "ready"}
        with self.house.db.write() as session:
            row = Model(id=ids.new("model"), name=name, base_model=self.house.base, created_at=clock.now(), **values)
            session.add(row)
        return name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, database_url: str, tiny_dir: Path) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("success")
    db = Database(database_url or f"sqlite:///{folder / 'service.db'}")
    migrations.upgrade(db)
    house = build_house(db, folder, tiny_dir)
    house.offer()
    job = house.job(suffix="schema")
    house.dispatch()
    assert house.work()
    assert house.get(job).status == "succeeded"
    with db.write() as session:
        key = auth.create(
            session, project_id=house.tenant["project"], name="provider", role="provider", now=clock.now()
        ).secret
    engine = TransformersEngine(house.blobs.fetch_tree, threads=1)
    limits = Limits(requests_per_minute=10**9, jobs_active=10**6)
    app = create_app(house.settings.model_copy(update={"limits": limits}), db=db, blobs=house.blobs, inference=engine)
    client = TestClient(app, headers={"authorization": f"Bearer {key}"})
    yield Place(app, house, client, schemathesis.openapi.from_asgi("/openapi.json", app), job)
    engine.close()
    db.close()


Real = Callable[[Place], dict[str, Any]]
IN_PATH: dict[tuple[str, str], Real] = {
    ("GET", "/v1/files/{file_id}"): lambda place: {"file_id": place.file()},
    ("DELETE", "/v1/files/{file_id}"): lambda place: {"file_id": place.file()},
    ("GET", "/v1/files/{file_id}/content"): lambda place: {"file_id": place.file()},
    ("POST", "/v1/uploads/{upload_id}/parts"): lambda place: {"upload_id": place.upload()},
    ("POST", "/v1/uploads/{upload_id}/complete"): lambda place: {"upload_id": place.upload()},
    ("POST", "/v1/uploads/{upload_id}/cancel"): lambda place: {"upload_id": place.upload()},
    ("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel"): lambda p: {"fine_tuning_job_id": p.new_job()},
    ("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause"): lambda p: {"fine_tuning_job_id": p.new_job()},
    ("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume"): lambda p: {"fine_tuning_job_id": p.paused_job()},
    ("DELETE", "/v1/models/{model}"): lambda place: {"model": place.model()},
    ("POST", "/v1/holdtrue/keys/{key_id}/rotate"): lambda place: {"key_id": place.key()},
    ("DELETE", "/v1/holdtrue/keys/{key_id}"): lambda place: {"key_id": place.key()},
    ("POST", "/v1/holdtrue/projects/{project_id}/limits"): lambda place: {"project_id": place.project()},
}
"""What a request needs in its path, new for each; all others read the trained job or its model."""


def real_body(place: Place, path: str, path_parameters: dict[str, Any], body: Any) -> Any:
    """Return a generated body with real ids in the place of made-up ones, and without what may rightly be refused."""
    made = body if isinstance(body, dict) else {}

    def some(*names: str) -> dict[str, Any]:
        return {name: made[name] for name in names if name in made}

    match path:
        case "/v1/fine_tuning/jobs":
            real = {"model": place.house.base, "training_file": place.file()}
            return some("suffix", "seed", "metadata", "integrations") | real
        case "/v1/uploads/{upload_id}/complete":
            where = f"uploads/{path_parameters['upload_id']}/parts"
            return {"part_ids": [place.post(where, files={"data": b"abc"})["id"]]}
        case "/v1/chat/completions":
            model = place.house.get(place.job).fine_tuned_model
            asked = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
            return some("temperature", "top_p", "seed", "n", "stream", "logprobs", "user", "metadata") | asked
        case "/v1/holdtrue/keys":
            return some("name", "role", "expires_in")
        case "/v1/holdtrue/projects":
            return some("name", "limits") | {"organization_id": place.house.tenant["organization"]}
    return body


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_success_is_as_the_document_says(place: Place, method: str, path: str):
    answered: list[int] = []

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=place.document[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def ask(case: schemathesis.Case) -> None:
        if "{" in path:
            name = place.house.get(place.job).fine_tuned_model
            found = IN_PATH.get((method, path), lambda _: {"fine_tuning_job_id": place.job, "model": name})(place)
            case.path_parameters = {key: value for key, value in found.items() if f"{{{key}}}" in path}
        case.query = {key: value for key, value in (case.query or {}).items() if key not in LISTS}
        if method == "POST":
            case.body = real_body(place, path, case.path_parameters or {}, case.body)
        headers = {"authorization": place.client.headers["authorization"]}
        answer = case.call(headers=headers)
        case.validate_response(answer, checks=CHECKS[:5])
        answered.append(answer.status_code)

    ask()
    assert 200 in answered, answered
