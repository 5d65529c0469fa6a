"""A database that is full, locked or away costs a job time, and no try: nobody can tell afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from holdtrue.service.jobs import events, leases, lifecycle, worker
from holdtrue.service.jobs.dispatcher import Dispatcher
from holdtrue.service.jobs.holding import Held
from holdtrue.service.jobs.progress import Reporter
from holdtrue.service.jobs.worker import Worker
from holdtrue.service.store.database import Database, trouble
from holdtrue.service.store.schema import Job
from small_disk import fill, mounted
from support import free_port

from .test_faults import story


class Narrow:
    """A house whose database can be left without room, for real: SQLite's by its pages, PostgreSQL's by its disk.

    Attributes:
        refused: what the database has said for want of room.
    """

    def __init__(self, house, disk: Path | None) -> None:
        self.refused: list[str] = []
        self._house, self._disk, self._most = house, disk, 2**30
        engine = house.db.engine
        event.listen(engine, "handle_error", self._hear)
        if disk is None:
            # At each start, since a connection keeps its limit; no limit is below the pages that there are.
            event.listen(engine, "begin", lambda c: c.exec_driver_sql(f"PRAGMA max_page_count = {self._most}").scalar())
        self._other = house.job()
        with house.db.write() as session:
            lifecycle.request(session, session.get_one(Job, house.get(self._other).seq), "cancel")

    def fill(self) -> None:
        """Let the database have no further page, and the pages of events no room."""
        if self._disk is None:
            self._most = 1
        else:
            fill(self._disk)
        before = len(self.refused)
        for length in (1000, 100, 1):
            with contextlib.suppress(OperationalError):
                while True:
                    self._add("x" * length)
        assert len(self.refused) >= before + 3

    def make_room(self) -> None:
        self._most = 2**30
        if self._disk is not None:
            (self._disk / "filler").unlink()

    def _add(self, message: str) -> None:
        with self._house.db.write() as session:
            events.add(session, session.get_one(Job, self._house.get(self._other).seq), message)

    def _hear(self, context) -> None:
        said = str(context.original_exception)
        if "disk is full" in said or "No space left" in said:
            self.refused.append(said)


@pytest.fixture
def narrow(house, request: pytest.FixtureRequest) -> Iterator[Narrow]:
    if house.db.is_sqlite:
        yield Narrow(house, None)
        return
    postgres = request.getfixturevalue("postgres")
    disk, name = postgres.folder / "small", house.db.url.database
    with mounted(disk, "32m"):
        postgres.own(disk)
        postgres.administer(f"CREATE TABLESPACE small LOCATION '{disk}'")
        house.db.close()
        postgres.administer(f"ALTER DATABASE {name} SET TABLESPACE small")
        yield Narrow(house, disk)
        house.db.close()
        (disk / "filler").unlink(missing_ok=True)
        postgres.administer(f"ALTER DATABASE {name} SET TABLESPACE pg_default")
        postgres.administer("DROP TABLESPACE small")


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def in_training(house, monkeypatch: pytest.MonkeyPatch, job_id: str, act: Callable[[], object]) -> None:
    """Let something happen once, in the middle of a job's training."""
    inner, done = Reporter._flush, []

    def flush(self):
        inner(self)
        if not done and house.get(job_id).stage == "train":
            done.append(1)
            act()

    monkeypatch.setattr(Reporter, "_flush", flush)


def one_done_and_one_queued(house) -> tuple[str, str]:
    plain = house.job()
    house.dispatch()
    house.work()
    job_id = house.job()
    house.dispatch()
    return plain, job_id


def undisturbed(texts: list[str]) -> list[str]:
    return [text for text in texts if "goes on when" not in text and text != "The job is running"]


def test_a_job_waits_while_the_database_is_full(house, narrow, monkeypatch):
    monkeypatch.setattr(worker, "FAILED_SECONDS", 0.2)
    plain, job_id = one_done_and_one_queued(house)
    in_training(house, monkeypatch, job_id, narrow.fill)
    stop = threading.Event()
    work = Worker(house.settings, db=house.db, blobs=house.blobs).run
    thread = threading.Thread(target=work, args=(stop,), daemon=True)
    thread.start()
    until(lambda: len(narrow.refused) > 6)
    job = house.get(job_id)
    assert (job.status, job.error) in (("running", None), ("queued", None))
    assert job.tries <= 1
    narrow.make_room()
    until(lambda: house.get(job_id).status == "succeeded")
    stop.set()
    thread.join(30)
    assert house.get(job_id).tries == house.get(plain).tries
    assert house.visible(job_id) == house.visible(plain)
    assert any("storage is full" in text for text in house.messages(job_id))
    assert undisturbed(story(house, job_id)) == undisturbed(story(house, plain))


def test_a_job_is_validated_when_the_database_has_room_again(house, narrow):
    plain = house.job()
    house.dispatch()
    job_id = house.job()
    narrow.fill()
    dispatcher = Dispatcher(house.settings, db=house.db, blobs=house.blobs)
    assert dispatcher.validate_one()
    assert house.get(job_id).status == "validating_files"
    narrow.make_room()
    house.dispatch()
    job = house.get(job_id)
    assert (job.status, job.tries, job.resolved) == ("queued", 0, house.get(plain).resolved)
    assert story(house, job_id) == story(house, plain)


@pytest.mark.parametrize(
    "seconds", [1.0, pytest.param(4.0, marks=pytest.mark.slow)], ids=["shorter than its lease", "longer"]
)
def test_a_job_waits_while_sqlite_is_locked(house, monkeypatch, seconds):
    if not house.db.is_sqlite:
        pytest.skip("its writers do not wait for each other")
    monkeypatch.setattr(worker, "FAILED_SECONDS", 0.2)
    plain, job_id = one_done_and_one_queued(house)
    other = sqlite3.connect(str(house.db.url.database), isolation_level=None, check_same_thread=False)

    def lock() -> None:
        other.execute("BEGIN IMMEDIATE")
        threading.Timer(seconds, other.execute, ["COMMIT"]).start()
        time.sleep(0.7 * seconds)

    in_training(house, monkeypatch, job_id, lock)
    impatient = Database(house.settings.database, connect_args={"timeout": 0.2, "check_same_thread": False})
    patient = Worker(house.settings, db=impatient, blobs=house.blobs)
    assert patient.work_one()
    other.close()
    job = house.get(job_id)
    assert (job.status, job.tries, job.error) == ("queued", 0, None)
    assert house.messages(job_id)[-1] == "The service's database does not answer; the job goes on when it does"
    until(patient.work_one)
    impatient.close()
    assert house.visible(job_id) == house.visible(plain)
    assert undisturbed(story(house, job_id)) == undisturbed(story(house, plain))


def test_a_worker_knows_a_lease_that_it_lost_from_a_database_that_is_away(house, tmp_path):
    house.job()
    house.dispatch()
    lease = leases.take(house.db, "w", 30)
    assert lease is not None
    away = Database(f"sqlite:///{tmp_path / 'nowhere' / 'service.db'}")
    for found, is_away in ((dataclasses.replace(lease, fence=-1), False), (dataclasses.replace(lease, db=away), True)):
        held = Held(dataclasses.replace(found, seconds=0.3), threading.Event())
        with held:
            assert held.stop.wait(20)
        assert (held.lost, held.away) == (True, is_away)


@pytest.mark.parametrize("url", ["sqlite:////nowhere/service.db", "postgresql://holdtrue@127.0.0.1:{port}/x"])
def test_a_database_that_cannot_be_reached_is_away(url):
    db = Database(url.format(port=free_port()))
    with pytest.raises(OperationalError) as caught, db.read() as session:
        session.execute(text("SELECT 1"))
    assert trouble(caught.value) == "away"


def test_a_statement_that_is_refused_for_what_it_says_does_not_pass(house):
    with pytest.raises(DBAPIError) as caught, house.db.read() as session:
        session.execute(text("SELECT * FROM nowhere"))
    assert trouble(caught.value) is None
