"""An API that is killed, a database that restarts, a disk that is full: what was answered is there, and once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import func, select, text

from holdtrue.service import audit, clock
from holdtrue.service.jobs.dispatcher import Dispatcher
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import retention
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.schema import File, UploadPart
from small_disk import fill, mounted

from ..jobs.test_faults import dying
from .conftest import BASE, ROW, Server, settings_of, start, stop

PUT, DELETE = "holdtrue.service.store.blobs:Blobs.put", "holdtrue.service.store.blobs:Blobs.delete"
DROP = "holdtrue.service.api.uploads:_drop_parts"
SEND = ("holdtrue.service.api.edge:_Exchange.send", "before", 1)
POINTS = [
    ("parts", (PUT, "before", 1)),
    ("parts", (PUT, "after", 1)),
    ("parts", ("holdtrue.service.api.uploads:_store_part", "after", 1)),
    ("parts", SEND),
    ("complete", (PUT, "after", 1)),
    ("complete", ("holdtrue.service.api.files:add_file", "after", 1)),
    ("complete", (DROP, "before", 1)),
    ("complete", (DELETE, "after", 1)),
    ("complete", SEND),
    ("cancel", (DROP, "before", 1)),
    ("cancel", (DELETE, "after", 1)),
    ("cancel", SEND),
]
FEW = {6}
HALVES = [(ROW * 3).encode(), (ROW * 4).encode()]


@pytest.mark.parametrize(
    ("step", "point"),
    [pytest.param(*each, marks=() if n in FEW else pytest.mark.slow) for n, each in enumerate(POINTS)],
    ids=str,
)
def test_an_upload_to_an_api_that_is_killed_goes_on_as_if_it_had_not_been(
    tmp_path: Path, fresh_url: str, step: str, point: tuple
):
    settings = settings_of(tmp_path / "home", fresh_url)
    server = start(settings.home, HOLDTRUE_DATABASE_URL=fresh_url)
    with server.client() as client:
        total = sum(map(len, HALVES))
        upload = client.uploads.create(bytes=total, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune").id
        sent = [client.uploads.parts.create(upload, data=half).id for half in HALVES[: 1 if step == "parts" else 2]]
    stop(server)
    headers = {"authorization": f"Bearer {server.key}", "idempotency-key": "again"}
    body = {
        "parts": {"files": {"data": ("b", HALVES[1])}},
        "complete": {"json": {"part_ids": sent}},
        "cancel": {},
    }[step]
    with dying(settings, point) as url, pytest.raises(httpx.TransportError):
        httpx.post(f"{url}/uploads/{upload}/{step}", headers=headers, timeout=60, **body)
    again = start(settings.home, key=server.key, HOLDTRUE_DATABASE_URL=fresh_url)
    try:
        answer = httpx.post(f"{again.url}/uploads/{upload}/{step}", headers=headers, timeout=60, **body)
        assert answer.status_code == 200, answer.text
        with again.client() as client:
            if step == "parts":
                assert count(again, UploadPart) == 2
                sent.append(answer.json()["id"])
                client.uploads.complete(upload, part_ids=sent)
            if step == "cancel":
                assert answer.json()["status"] == "cancelled"
                assert client.files.list().data == []
            else:
                (file,) = client.files.list().data
                assert client.files.content(file.id).read() == b"".join(HALVES)
        later = round(clock.now() + retention.GRACE_SECONDS + 60)
        blobs = Blobs(settings.blobs)
        retention.sweep(again.db, blobs, later, settings)
        with again.db.read() as session:
            kept = set(session.scalars(select(File.blob)))
        assert {stored.key for stored in blobs.stored()} == kept
        assert len(kept) == (step != "cancel")
        assert count(again, UploadPart) == 0
        assert [path for path in settings.home.rglob("incoming/*") if path.is_file()] == []
    finally:
        stop(again)


def count(server: Server, table: type) -> int:
    with server.db.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_requests_while_postgresql_restarts(postgres, postgres_url: str, tmp_path: Path):
    server = start(tmp_path / "home", HOLDTRUE_DATABASE_URL=postgres_url)
    site = server.url.removesuffix("/v1")
    try:
        with server.client() as client:
            file_id = client.files.create(file=("a.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
            postgres.stop()
            try:
                asks: list[Callable[[], object]] = [
                    lambda: client.models.list(),
                    lambda: client.files.create(file=("b.jsonl", b"{}"), purpose="user_data"),
                    lambda: client.fine_tuning.jobs.create(model=BASE, training_file=file_id),
                ]
                for ask in asks:
                    with pytest.raises(openai.InternalServerError) as caught:
                        ask()
                    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
                    assert int(caught.value.response.headers["retry-after"]) > 0
                assert httpx.get(f"{site}/healthz").status_code == 200
                assert httpx.get(f"{site}/readyz").json()["database"] is False
            finally:
                postgres.start()
            assert [file.id for file in client.files.list()] == [file_id]
            assert httpx.get(f"{site}/readyz").status_code == 200
        jobs_over_a_restart(postgres, server, file_id)
    finally:
        assert stop(server) == 0


def jobs_over_a_restart(postgres, server: Server, file_id: str) -> None:
    """Eight clients ask for two jobs each while the database goes and comes back; each job is there once."""

    def ask(number: int) -> list[str]:
        with server.client(max_retries=8) as client:
            return [
                client.fine_tuning.jobs.create(
                    model=BASE, training_file=file_id, extra_headers={"Idempotency-Key": f"{number}-{each}"}
                ).id
                for each in range(2)
            ]

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        threading.Event().wait(0.1)
        postgres.stop()
        threading.Event().wait(0.5)
        postgres.start()
        made = [job_id for each in asked for job_id in each.result(120)]
    with server.client() as client:
        assert sorted(job.id for job in client.fine_tuning.jobs.list(limit=100)) == sorted(made)
    assert len(set(made)) == 16
    with server.db.read() as session:
        assert audit.verify(session).broken is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A service's home on a file system of 12 MiB."""
    with mounted(tmp_path / "home", "12m"):
        yield tmp_path / "home"


def test_sqlite_on_a_full_disk_refuses_and_loses_nothing(small_disk: Path):
    server = start(small_disk)
    try:
        with server.client() as client:
            file_id = client.files.create(file=("a.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
            made = [create(client, file_id)]
            filler = fill(small_disk)
            with pytest.raises(openai.InternalServerError) as caught:
                client.files.create(file=("b.jsonl", b"x" * 2**20), purpose="user_data")
            assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
            with pytest.raises(openai.InternalServerError) as caught:  # what room its log still has is used up first
                use_up(client, file_id, made)
            assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
            assert client.files.list().data[0].id == file_id  # what only reads goes on
            filler.unlink()
            made.append(create(client, file_id))
            assert {job.id for job in client.fine_tuning.jobs.list(limit=100)} == set(made)
            assert [file.id for file in client.files.list()] == [file_id]
        settings = ServiceSettings(home=small_disk)
        assert Dispatcher(settings, db=server.db).validate_one()
        with server.db.read() as session:
            assert session.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
    finally:
        assert stop(server) == 0


def create(client: OpenAI, file_id: str) -> str:
    return client.fine_tuning.jobs.create(model=BASE, training_file=file_id).id


def use_up(client: OpenAI, file_id: str, made: list[str]) -> None:
    for _ in range(500):
        made.append(create(client, file_id))
        client.fine_tuning.jobs.cancel(made[-1])
