"""Many pages at once, and a database that has no connection left."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from anyio import from_thread, to_thread
from fastapi import FastAPI
from sqlalchemy import event
from starlette.testclient import TestClient

from holdtrue.service import tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.database import CONNECTIONS, Database

from ..api.conftest import BASE, ROW, Server
from . import trained
from .conftest import HTML

AT_ONCE = 40


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    settings = ServiceSettings(home=tmp_path)
    made = create_app(settings, db=Database(settings.database, pool_timeout=0.5))
    migrations.upgrade(made.state.parts.db)
    made.state.key = tenancy.bootstrap(made.state.parts.db).key
    yield made
    made.state.parts.db.close()


def test_forty_pages_of_a_job_at_once(server: Server, visit):
    with server.client() as client:
        file = client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file, metadata={"a": "b"}).id
    trained.decided(server, job, "hold")
    browser = visit(server.key)
    barrier = threading.Barrier(AT_ONCE)

    def look(_: int) -> int:
        with httpx.Client(base_url=browser.http.base_url, headers=HTML, cookies=browser.http.cookies) as http:
            barrier.wait(30)
            return http.get(f"/jobs/{job}", timeout=120).status_code

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(look, range(AT_ONCE))) == [200] * AT_ONCE


def test_there_is_a_connection_for_every_thread():
    def threads() -> float:
        return to_thread.current_default_thread_limiter().total_tokens

    with from_thread.start_blocking_portal() as portal:
        assert portal.call(threads) <= CONNECTIONS


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_database_hands_out_so_many_connections(database: str, tmp_path: Path, request: pytest.FixtureRequest):
    url = f"sqlite:///{tmp_path / 'x.db'}" if database == "sqlite" else request.getfixturevalue("postgres_url")
    db = Database(url, pool_timeout=0.5)
    taken = [db.engine.connect() for _ in range(CONNECTIONS)]
    for connection in taken:
        connection.close()
    db.close()


def test_a_page_takes_one_connection_at_a_time(app: FastAPI):
    client = TestClient(app, headers={"authorization": f"Bearer {app.state.key}"})
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROW)}).json()["id"]
    job = client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file}).json()["id"]
    page = TestClient(app, headers=HTML)
    token = re.findall(r'name="csrf" value="([^"]+)"', page.get("/sign-in").text)[0]
    page.post("/sign-in", data={"csrf": token, "key": app.state.key})
    out, most = 0, 0

    def taken(*_: object) -> None:
        nonlocal out, most
        out += 1
        most = max(most, out)

    def given_back(*_: object) -> None:
        nonlocal out
        out -= 1

    engine = app.state.parts.db.engine
    event.listen(engine, "checkout", taken)
    event.listen(engine, "checkin", given_back)
    paths = ["/jobs", f"/jobs/{job}", f"/jobs/{job}/events", "/usage", "/keys", "/policies", "/gate"]
    for path in paths:
        assert page.get(path).status_code == 200
    assert (out, most) == (0, 1)


def test_a_service_without_a_free_connection_says_so(app: FastAPI):
    client = TestClient(app, headers={"authorization": f"Bearer {app.state.key}"})
    taken = [app.state.parts.db.engine.connect() for _ in range(CONNECTIONS)]
    answer = client.get("/v1/files")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert answer.headers["retry-after"] == "5"
    for connection in taken:
        connection.close()
    assert client.get("/v1/files").status_code == 200
