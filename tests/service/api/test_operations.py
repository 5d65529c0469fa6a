"""What machines that watch the service see of it, and what is said when something below it fails."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from holdtrue.service import tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database

from .conftest import ROW


def make(home: Path, db: Database | None = None, **options: Any) -> FastAPI:
    app = create_app(ServiceSettings(home=home, **options), db=db)
    migrations.upgrade(app.state.parts.db)
    app.state.key = tenancy.bootstrap(app.state.parts.db).key
    return app


@pytest.fixture
def app(tmp_path: Path, empty_db: Database) -> FastAPI:
    return make(tmp_path, empty_db)


def lose(db: Database, table: str) -> None:
    """Take away what is asked for: of SQLite a table, of PostgreSQL the whole database."""
    if db.is_sqlite:
        with db.write() as session:
            session.connection().exec_driver_sql(f"ALTER TABLE {table} RENAME TO away")
        return
    admin = Database(
        db.url.set(database="postgres").render_as_string(hide_password=False), isolation_level="AUTOCOMMIT"
    )
    with contextlib.closing(admin), admin.engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {db.url.database} WITH (FORCE)")


def client_of(app: FastAPI) -> TestClient:
    return TestClient(app, headers={"authorization": f"Bearer {app.state.key}"}, raise_server_exceptions=False)


def test_health_and_readiness(app: FastAPI, monkeypatch: pytest.MonkeyPatch):
    client = TestClient(app)
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok", "database": True, "objects": True}
    lose(app.state.parts.db, "organizations")
    found = client.get("/readyz")
    assert (found.status_code, found.json()) == (503, {"status": "failing", "database": False, "objects": True})
    assert client.get("/healthz").status_code == 200


def test_metrics(app: FastAPI):
    client = client_of(app)
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)}).json()["id"]
    client.post("/v1/fine_tuning/jobs", json={"model": "smollm2-135m-instruct", "training_file": file})
    client.get(f"/v1/files/{file}")
    client.get("/v1/files/file-nothing")
    client.request("ODD", "/v1/secret-path")
    page = client.get("/metrics").text
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }

    def count(route: str, status: str, method: str = "GET") -> float:
        return found["holdtrue_requests_total", ("method", method), ("route", route), ("status", status)]

    assert count("/v1/files/{file_id}", "200") == 1
    assert count("/v1/files/{file_id}", "404") == 1
    assert count("unmatched", "404", "other") == 1
    assert found["holdtrue_jobs", ("status", "validating_files")] == 1
    assert found["holdtrue_requests_in_flight",] == 1
    assert not re.search(r"proj-|key-|org-|file-\w{24}|secret-path", page)


def test_metrics_beyond_this_machine_want_the_providers_key(tmp_path: Path):
    app = make(tmp_path, host="0.0.0.0", behind_tls=True)
    assert TestClient(app).get("/metrics").status_code == 401
    assert client_of(app).get("/metrics").status_code == 200
    app.state.parts.db.close()


def test_a_full_disk_and_a_lost_database_are_said_as_such(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    client = client_of(app)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/place")

    with monkeypatch.context() as patch:
        patch.setattr(app.state.parts.blobs, "put", full)
        answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert answer.headers["retry-after"] == "5"
    assert client.get("/v1/files").json()["data"] == []
    lose(app.state.parts.db, "files")
    assert client.get("/v1/files").status_code == 503


def test_a_bug_tells_nothing(app: FastAPI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(key: str) -> bool:
        raise KeyError("a customer's secret text")

    client = client_of(app)
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)}).json()["id"]
    monkeypatch.setattr(app.state.parts.blobs, "exists", broken)
    answer = client.get(f"/v1/files/{file}/content")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.headers["x-request-id"].startswith("req-")
    told = capsys.readouterr()
    assert "secret" not in answer.text + told.out + told.err
    assert "KeyError" in told.out + told.err


def test_opentelemetry_traces_where_it_is_asked_to(tmp_path: Path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from starlette.testclient import TestClient\n"
        "from holdtrue.service.api.app import create_app\n"
        "from holdtrue.service.settings import ServiceSettings\n"
        "app = create_app(ServiceSettings(home=Path(sys.argv[1])))\n"
        "TestClient(app).get('/v1/models', headers={'authorization': 'Bearer sk-secret'})\n"
    )

    def run(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True, text=True, check=True, env={**os.environ, **environment},
        )  # fmt: skip
        return done.stdout

    traced = run(OTEL_TRACES_EXPORTER="console")
    assert '"service.name": "holdtrue-api"' in traced
    assert "sk-secret" not in traced
    assert "trace_id" not in run()
