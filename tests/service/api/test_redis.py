"""Several API processes that count requests together, in a real Redis."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from holdtrue.service import tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Project
from support import free_port


class Redis:
    """A server that keeps nothing, on the loopback address alone."""

    def __init__(self, program: str, folder: Path) -> None:
        self.url = f"redis://127.0.0.1:{free_port()}"
        self._command = [program, "--port", self.url.rpartition(":")[2], "--bind", "127.0.0.1", "--save", ""]
        self._folder = folder
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=self._folder, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "Ready to accept connections" in line:
                return
        raise AssertionError("Redis did not start")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.communicate()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("Redis is not installed: its program redis-server is not found")
    server = Redis(program, tmp_path)
    yield server
    server.stop()


@pytest.fixture
def apps(tmp_path: Path, db: Database, redis: Redis) -> list[FastAPI]:
    settings = ServiceSettings(home=tmp_path, rate_limit_storage=redis.url)
    found = [create_app(settings, db=db) for _ in range(2)]
    key = tenancy.bootstrap(db).key
    for app in found:
        app.state.key = key
    return found


def client_of(app: FastAPI) -> TestClient:
    return TestClient(app, headers={"authorization": f"Bearer {app.state.key}"}, raise_server_exceptions=False)


def limit(app: FastAPI, per_minute: int) -> None:
    with app.state.parts.db.write() as session:
        for project in session.query(Project):
            project.limits = {"requests_per_minute": per_minute}


def test_a_project_has_one_minute_for_all_processes(apps: list[FastAPI]):
    limit(apps[0], 7)
    one, other = map(client_of, apps)
    codes = [client.get("/v1/models").status_code for _ in range(6) for client in (one, other)]
    assert codes == [200] * 7 + [429] * 5
    refused = other.get("/v1/models")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) > 0


def test_a_refusal_is_known_to_the_other_process(apps: list[FastAPI]):
    """What a client sends again after a refusal is not taken for an equal request that was done before."""
    one, other = map(client_of, apps)

    def create(client: TestClient, tries: int) -> str:
        answer = client.post(
            "/v1/uploads",
            json={"purpose": "fine-tune", "filename": "a.jsonl", "bytes": 10, "mime_type": "application/jsonl"},
            headers={"x-stainless-retry-count": str(tries)},
        )
        return answer.json()["id"] if answer.status_code == 200 else f"refused: {answer.status_code}"

    first = create(one, 0)
    assert create(other, 1) == first  # its answer was lost, and the client came again
    limit(apps[0], 1)
    one.get("/v1/models")
    assert create(one, 0) == "refused: 429"
    limit(apps[0], 100)
    second = create(other, 1)
    assert second.startswith("upload-")
    assert second != first


def test_a_redis_that_is_gone_or_hangs_is_said_as_such_and_comes_back(apps: list[FastAPI], redis: Redis):
    client = client_of(apps[0])
    assert client.get("/v1/models").status_code == 200

    def is_away() -> bool:
        start = time.monotonic()
        answer, ready = client.get("/v1/models"), client.get("/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert (ready.status_code, ready.json()["counts"]) == (503, False)
        return time.monotonic() - start < 30

    redis.stop()
    assert is_away()
    redis.start()
    assert client.get("/v1/models").status_code == 200
    assert client.get("/readyz").status_code == 200
    redis.process.send_signal(signal.SIGSTOP)
    assert is_away()
    redis.process.send_signal(signal.SIGCONT)
    assert client.get("/v1/models").status_code == 200
