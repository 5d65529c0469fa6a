"""Who holds a job, on both databases."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from holdtrue.service.jobs import leases, lifecycle
from holdtrue.service.jobs.leases import MOST_TRIES, LeaseLostError
from holdtrue.service.store.schema import Job, JobEvent


@pytest.fixture
def queued(house):
    """Returns a function that makes a queued job."""

    def make() -> str:
        job_id = house.job()
        with house.db.write() as session:
            job = session.get(Job, house.get(job_id).seq)
            job.resolved = {}
            lifecycle.move(session, job, "queued", "queued")
        return job_id

    return make


def expire(house, job_id: str) -> None:
    with house.db.write() as session:
        session.get(Job, house.get(job_id).seq).lease_until = 1.0


def take(house, owner: str, seconds: float) -> leases.Lease:
    """Take a job that is known to be there."""
    lease = leases.take(house.db, owner, seconds)
    assert lease is not None
    return lease


def race(house, workers: int) -> list[leases.Lease]:
    """Let many try to take a job at the same moment."""
    barrier = threading.Barrier(workers)

    def one(number: int) -> leases.Lease | None:
        barrier.wait(30)
        return leases.take(house.db, f"worker {number}", 30)

    with ThreadPoolExecutor(workers) as pool:
        return [lease for lease in pool.map(one, range(workers)) if lease is not None]


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_of_fifty_workers_one_gets_the_job(house, queued, rounds):
    for _ in range(rounds):
        job_id = queued()
        (winner,) = race(house, 50)
        assert winner.job_id == job_id
        with winner.write() as (session, job):
            lifecycle.move(session, job, "succeeded", "done")


def test_an_expired_lease_is_taken_over_and_the_old_one_is_void(house, queued):
    job_id = queued()
    old = take(house, "old", 30)
    assert leases.take(house.db, "new", 30) is None
    expire(house, job_id)
    new = take(house, "new", 30)
    assert new.job_id == job_id
    assert new.fence > old.fence
    for act in (old.renew, lambda: old.write().__enter__()):
        with pytest.raises(LeaseLostError):
            act()
    old.release()
    assert house.get(job_id).lease_owner == "new"
    assert new.renew() == "run"
    assert any("another takes over" in text for text in house.messages(job_id))


def test_nothing_is_written_where_the_lease_was_lost_inside(house, queued):
    job_id = queued()
    lease = take(house, "w", 30)
    with house.db.write() as session:
        lifecycle.request(session, session.get(Job, house.get(job_id).seq), "cancel")
    before = len(house.messages(job_id))
    with pytest.raises(LeaseLostError), lease.write() as (session, job):
        job.stage = "never"
    assert len(house.messages(job_id)) == before
    assert house.get(job_id).stage is None


def test_a_silent_worker_of_a_job_to_be_paused_leaves_it_paused(house, queued):
    job_id = queued()
    leases.take(house.db, "w", 30)
    with house.db.write() as session:
        lifecycle.request(session, session.get(Job, house.get(job_id).seq), "pause")
    expire(house, job_id)
    assert leases.take(house.db, "v", 30) is None
    assert house.get(job_id).status == "paused"


def test_a_job_that_kills_every_worker_is_given_up(house, queued):
    job_id = queued()
    for _ in range(MOST_TRIES):
        assert leases.take(house.db, "w", 30) is not None
        expire(house, job_id)
    assert leases.take(house.db, "w", 30) is None
    job = house.get(job_id)
    assert job.status == "failed"
    assert str(MOST_TRIES) in job.error["message"]


def test_a_lease_lives_while_it_is_renewed(house, queued):
    queued()
    lease = take(house, "w", 0.6)
    for _ in range(4):
        time.sleep(0.2)
        lease.renew()
        assert leases.take(house.db, "v", 30) is None
    time.sleep(0.8)
    assert leases.take(house.db, "v", 30) is not None


def test_asked_twice_is_as_asked_once(house, queued):
    job_id = queued()
    for wanted in ("run", "pause", "pause", "run", "run", "cancel", "cancel"):
        with house.db.write() as session:
            lifecycle.request(session, session.get(Job, house.get(job_id).seq), wanted)
    assert house.get(job_id).status == "cancelled"
    assert [e.message for e in house.all(JobEvent, job_id)][-3:] == [
        "The job is paused",
        "The job goes on",
        "The job was cancelled",
    ]
    with house.db.write() as session, pytest.raises(lifecycle.TransitionError, match="cancelled"):
        lifecycle.request(session, session.get(Job, house.get(job_id).seq), "run")
