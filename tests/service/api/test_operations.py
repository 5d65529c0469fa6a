"""What machines that watch the service see of it, and what is said when something below it fails."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from limits.storage import MemoryStorage
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from holdtrue.service import tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import ApiKey, Job, Project
from support import free_port

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
    assert client.get("/readyz").json() == {"status": "ok", "database": True, "objects": True, "counts": True}
    lose(app.state.parts.db, "organizations")
    found = client.get("/readyz")
    assert found.status_code == 503
    assert found.json() == {"status": "failing", "database": False, "objects": True, "counts": True}
    assert client.get("/healthz").status_code == 200


def test_readiness_asks_the_object_store(app: FastAPI, tmp_path: Path):
    client = TestClient(app)
    (tmp_path / "blobs").rename(tmp_path / "unplugged")
    (tmp_path / "blobs").mkdir()  # where its disk would be mounted
    found = client.get("/readyz")
    assert found.status_code == 503
    assert found.json() == {"status": "failing", "database": True, "objects": False, "counts": True}
    (tmp_path / "blobs").rmdir()
    (tmp_path / "unplugged").rename(tmp_path / "blobs")
    assert client.get("/readyz").status_code == 200


def test_a_store_that_is_away_is_said_as_such(app: FastAPI, tmp_path: Path):
    client = client_of(app)

    def upload() -> Any:
        return client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)})

    file, other = upload().json()["id"], upload().json()["id"]
    (tmp_path / "blobs").rename(tmp_path / "unplugged")
    for answer in (client.get(f"/v1/files/{file}/content"), upload()):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "unavailable"
        assert "object store" in answer.json()["error"]["message"]
        assert str(tmp_path) not in answer.text
    assert client.delete(f"/v1/files/{other}").json()["deleted"]  # the dispatcher takes its content later
    (tmp_path / "unplugged").rename(tmp_path / "blobs")
    assert client.get(f"/v1/files/{file}/content").text == ROW
    assert upload().status_code == 200


class Dialing(MemoryStorage):
    """A storage of counts that has to be reached over the network."""

    STORAGE_SCHEME = ["dialing"]  # noqa: RUF012 (the library's own form)

    def __init__(self, uri: str, wrap_exceptions: bool = False, **options: Any) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions, **options)
        self.port = int(uri.rpartition(":")[2])

    @property
    def base_exceptions(self) -> type[Exception]:
        return OSError

    def get(self, key: str) -> int:
        with socket.create_connection(("127.0.0.1", self.port)):
            return super().get(key)

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        with socket.create_connection(("127.0.0.1", self.port)):
            return super().acquire_sliding_window_entry(key, limit, expiry, amount)


@pytest.mark.parametrize("kind", ["dialing", "redis"])
def test_counts_that_cannot_be_reached_are_said_as_such(tmp_path: Path, empty_db: Database, kind: str):
    app = make(tmp_path, empty_db, rate_limit_storage=f"{kind}://127.0.0.1:{free_port()}")
    client = client_of(app)
    for answer in (
        client.get("/v1/models"),
        client.post("/v1/fine_tuning/jobs", json={}, headers={"x-stainless-retry-count": "0"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) > 0
    assert client.get("/healthz").status_code == 200
    found = client.get("/readyz")
    assert found.status_code == 503
    assert found.json() == {"status": "failing", "database": True, "objects": True, "counts": False}


def test_a_policy_that_cannot_be_read_is_said_as_such(app: FastAPI):
    client = client_of(app)
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)}).json()["id"]
    with app.state.parts.db.write() as session:
        session.connection().exec_driver_sql("UPDATE policies SET meaning = '{}'")
    answer = client.post("/v1/fine_tuning/jobs", json={"model": "smollm2-135m-instruct", "training_file": file})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


def test_a_read_waits_for_no_writer(app: FastAPI):
    """A backup keeps writers waiting; a key's use is then noted later."""
    client = client_of(app)
    with app.state.parts.db.write() as session:
        session.execute(select(ApiKey.id).with_for_update())
        began = time.monotonic()
        assert client.get("/v1/models").status_code == 200
        assert time.monotonic() - began < 5
    with app.state.parts.db.read() as session:
        assert session.scalars(select(ApiKey.last_used_at)).one() is None
    assert client.get("/v1/models").status_code == 200
    with app.state.parts.db.read() as session:
        assert session.scalars(select(ApiKey.last_used_at)).one() is not None


def test_a_retry_is_not_answered_with_an_equal_request_of_before(app: FastAPI):
    """The first attempt at a second job is refused before anything is done: its retry is not the first job's."""
    client, db = client_of(app), app.state.parts.db
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)}).json()["id"]

    def create(tries: int) -> Any:
        body = {"model": "smollm2-135m-instruct", "training_file": file, "seed": 1}
        return client.post("/v1/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": str(tries)})

    def rename(old: str, new: str) -> None:
        with db.write() as session:
            session.connection().exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    def limit(requests: int) -> None:
        with db.write() as session:
            session.scalars(select(Project)).one().limits = {"requests_per_minute": requests}

    first = create(0).json()["id"]
    assert create(1).json()["id"] == first
    refusals: list[tuple[Callable[[], object], Callable[[], object], int]] = [
        (lambda: (limit(1), client.get("/v1/models")), lambda: limit(1000), 429),
        # SQLite says of both that it cannot work; for PostgreSQL a table that is not there is a fault of ours.
        (lambda: rename("models", "away"), lambda: rename("away", "models"), 503 if db.is_sqlite else 500),
    ]
    seen = {first}
    for refuse, mend, status in refusals:
        refuse()
        assert create(0).status_code == status
        assert create(1).status_code == status
        mend()
        again = create(2).json()["id"]
        assert again not in seen
        assert create(3).json()["id"] == again  # its answer was lost
        seen.add(again)
    new = create(0).json()["id"]
    assert new not in seen
    assert create(1).json()["id"] == new


class Sender:
    """Sends jobs as OpenAI's client does, to any of the processes over one database."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        client = client_of(app)
        self.file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)}).json()["id"]

    def another(self, home: Path) -> FastAPI:
        """Return the app of another process, or of the same after its restart."""
        app = create_app(ServiceSettings(home=home), db=self.app.state.parts.db)
        app.state.key = self.app.state.key
        return app

    def limit(self, **limits: int) -> None:
        with self.app.state.parts.db.write() as session:
            session.scalars(select(Project)).one().limits = limits

    def send(self, tries: int, seed: int = 1, app: FastAPI | None = None) -> Any:
        body = {"model": "smollm2-135m-instruct", "training_file": self.file, "seed": seed}
        client = client_of(app or self.app)
        return client.post("/v1/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": str(tries)})

    def job(self, tries: int, **options: Any) -> str:
        return self.send(tries, **options).json()["id"]

    def refused(self, app: FastAPI | None = None, **options: Any) -> None:
        """Send a first attempt beyond the project's rate."""
        self.limit(requests_per_minute=1)
        client_of(app or self.app).get("/v1/models")
        assert self.send(0, app=app, **options).status_code == 429
        self.limit()


def test_a_refusal_that_no_client_tries_again_doubles_nothing(app: FastAPI):
    sender = Sender(app)
    first = sender.job(0)
    sender.limit(jobs_active=1)
    refused = sender.send(0)
    assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "false")
    sender.limit()
    assert sender.job(1) == first


def test_a_refusal_of_another_request_doubles_nothing(app: FastAPI):
    sender = Sender(app)
    first = sender.job(0, seed=1)
    sender.refused(seed=2)
    assert sender.job(1, seed=1) == first
    assert sender.job(1, seed=2) != first


def test_a_retry_after_a_restart_or_at_another_process_doubles_nothing(app: FastAPI, tmp_path: Path):
    """Marks in memory are lost, or older than what another process has done since."""
    sender = Sender(app)
    other = sender.another(tmp_path)
    sender.refused()
    first = sender.job(0)
    assert sender.job(1, app=sender.another(tmp_path)) == first
    sender.refused(app=other)
    second = sender.job(0)
    assert second != first
    assert sender.job(1, app=other) == second


@pytest.mark.parametrize("kept", [True, False])
def test_a_retry_after_a_commit_that_failed_is_done_once(app: FastAPI, kept: bool, monkeypatch: pytest.MonkeyPatch):
    """Its client was told of a failure, whether or not the database has kept the work."""
    sender, db = Sender(app), app.state.parts.db
    first = sender.job(0)
    whole = Database.write

    @contextlib.contextmanager
    def fails(self: Database, **options: Any) -> Iterator[Any]:
        lost = OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))
        with whole(self, **options) as session:
            yield session
            if not kept:
                raise lost
        raise lost

    client_of(app).get("/v1/models")  # the note of the key's use is a write as well
    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", fails)
        assert sender.send(0).status_code == 503
    again = sender.job(1)
    assert again != first
    assert sender.job(2) == again
    with db.read() as session:
        assert len(session.scalars(select(Job.id)).all()) == 2


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
    def broken(key: str) -> None:
        raise KeyError("a customer's secret text")

    client = client_of(app)
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)}).json()["id"]
    monkeypatch.setattr(app.state.parts.blobs, "open", broken)
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
        "client = TestClient(app, headers={'authorization': 'Bearer sk-secret'})\n"
        "for path in ('models/ft:base:org:hidden:x', 'fine_tuning/jobs?metadata[hidden]=hidden', 'hidden'):\n"
        "    client.get('/v1/' + path)\n"
    )

    def run(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True, text=True, check=True, env={**os.environ, **environment},
        )  # fmt: skip
        return done.stdout

    traced = run(OTEL_TRACES_EXPORTER="console", OTEL_SEMCONV_STABILITY_OPT_IN="http/dup")
    assert '"service.name": "holdtrue-api"' in traced
    assert '"http.target": "/v1/models/{model:path}"' in traced
    assert '"url.path": "/v1/fine_tuning/jobs"' in traced
    assert "sk-secret" not in traced
    assert "hidden" not in traced
    assert "trace_id" not in run()
