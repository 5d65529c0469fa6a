"""The stream of a job's page: whole, in order, ending when it should, and for nobody else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from holdtrue.service import auth, clock
from holdtrue.service.store.schema import ApiKey, WebSession

from ..api.conftest import BASE, ROW, Server, start, stop
from . import trained
from .conftest import HTML, Browserless


def new_job(server: Server, key: str | None = None) -> str:
    with server.client(key) as client:
        file = client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
        return client.fine_tuning.jobs.create(model=BASE, training_file=file).id


def read(browser: Browserless, job_id: str, after: int | str = 0, **headers: str) -> Iterator[tuple[str, str, dict]]:
    """Yield name, number and values of a stream's events until it ends."""
    path = f"/jobs/{job_id}/live"
    with browser.http.stream("GET", path, params={"after": after}, headers=headers, timeout=20) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        name, number = "", ""
        for line in answer.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name, number = value, ""
            elif key == "id":
                number = value
            elif key == "data":
                yield name, number, json.loads(value)


def test_a_stream_is_whole_resumes_and_ends_with_its_job(server: Server, visit):
    job_id = new_job(server)
    browser = visit(server.key)

    def work() -> None:
        for number in range(1, 9):
            trained.step(server, job_id, number)
            trained.tell(server, job_id, f"line {number}\nevent: end\n\ndata: {{}}")
        trained.move(server, job_id, status="succeeded")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    found = list(read(browser, job_id))
    thread.join()
    assert found[-1][0] == "end"
    assert [values["step"] for name, _, values in found if name == "metrics"] == list(range(1, 9))
    told = [values["message"] for name, _, values in found if name == "message"]
    assert told[2:] == [f"line {number}\nevent: end\n\ndata: {{}}" for number in range(1, 9)]
    numbers = [int(number) for _, number, _ in found if number]
    assert numbers == sorted(set(numbers))
    half = numbers[len(numbers) // 2]
    rest = [int(number) for _, number, _ in read(browser, job_id, **{"last-event-id": str(half)}) if number]
    assert rest == [number for number in numbers if number > half]
    assert [name for name, _, _ in read(browser, job_id, after=numbers[-1])] == ["state", "end"]


@pytest.mark.parametrize("after", [-1, 10**18])
def test_a_stream_takes_any_number(server: Server, visit, after: int):
    job_id = new_job(server)
    trained.move(server, job_id, status="cancelled")
    assert list(read(visit(server.key), job_id, after))[-1][0] == "end"


@pytest.mark.parametrize("way", ["revoked", "signed out"])
def test_a_stream_ends_with_its_session(server: Server, visit, way: str):
    key = server.tenant(f"watcher-{way.replace(' ', '-')}")
    job_id = new_job(server, key)
    stream = read(visit(key), job_id)
    assert next(stream)[0] == "message"
    with server.db.write() as session:
        row = session.scalars(select(ApiKey).where(ApiKey.digest == auth.digest(key))).one()
        if way == "revoked":
            auth.revoke(session, row, clock.now())
        else:
            for web in session.scalars(select(WebSession).where(WebSession.key_id == row.id)):
                session.delete(web)
    began = time.monotonic()
    assert "end" not in [name for name, _, _ in stream]
    assert time.monotonic() - began < 10


def test_one_project_cannot_take_all_streams(server: Server, visit):
    key = server.tenant("hoarder")
    job_id = new_job(server, key)
    browser, streams = visit(key), []
    try:
        for _ in range(20):
            streams.append(read(browser, job_id))
            next(streams[-1])
        refused = browser.get(f"/jobs/{job_id}/live")
        assert refused.status_code == 429
        other = new_job(server)
        assert next(read(visit(server.key), other))[0] == "message"
    finally:
        for stream in streams:
            stream.close()
    end = time.monotonic() + 10
    while browser.get(f"/jobs/{job_id}").status_code == 200 and time.monotonic() < end:
        try:
            stream = read(browser, job_id)
            assert next(stream)[0] == "message"
            stream.close()
            return
        except AssertionError:
            time.sleep(0.2)
    raise AssertionError("closed streams still count")


def test_the_service_stops_though_somebody_watches(tmp_path: Path):
    own = start(tmp_path / "home")
    job_id = new_job(own)
    http = httpx.Client(base_url=own.url.removesuffix("/v1"), headers=HTML, follow_redirects=True)
    stream = read(Browserless(http).sign_in(own.key), job_id)
    next(stream)
    began = time.monotonic()
    thread = threading.Thread(target=lambda: list(stream), daemon=True)
    thread.start()
    assert stop(own) == 0
    thread.join()
    http.close()
    assert time.monotonic() - began < 8
