"""What keeps one job keeps no other, costs no try, and ends as if nothing had been."""

from __future__ import annotations

import threading
import time
import types
from pathlib import Path

import pytest
from sqlalchemy import select, update

from holdtrue.service import clock, quotas, tenancy
from holdtrue.service.jobs import dispatcher, leases, lifecycle, worker
from holdtrue.service.jobs.dispatcher import Dispatcher
from holdtrue.service.jobs.progress import Reporter
from holdtrue.service.store.schema import File, Job, JobEvent, Policy, Project
from support import chat


def new_dispatcher(house) -> Dispatcher:
    return Dispatcher(house.settings, db=house.db, blobs=house.blobs)


def another_project(house) -> None:
    """Let what is made from here on belong to another project."""
    with house.db.write() as session:
        project = tenancy.create_project(session, house.tenant["organization"], "second", now=clock.now())
    house.tenant["project"] = project.id


def spoil_policy(house) -> str:
    """Make the policy in force one that cannot be read, put another in force, and return the first one's id."""
    with house.db.write() as session:
        policy = session.scalars(select(Policy)).one()
        policy.meaning, spoiled = str(policy.meaning).replace('"format":1', '"format":2'), policy.id
    house.policy(name="another")
    return spoiled


def mend_policy(house, policy_id: str) -> None:
    with house.db.write() as session:
        policy = session.get_one(Policy, policy_id)
        policy.meaning = str(policy.meaning).replace('"format":2', '"format":1')


def store_folder(house) -> Path:
    return house.settings.home / "blobs"


def test_a_job_under_a_policy_that_cannot_be_read_waits_alone(house):
    spoiled = house.job()
    policy_id = spoil_policy(house)
    other = house.job()
    house.dispatch()
    assert house.get(spoiled).status == "validating_files"
    assert house.get(other).status == "queued"
    mend_policy(house, policy_id)
    house.dispatch()
    assert house.get(spoiled).status == "queued"


def test_a_job_is_left_alone_for_longer_each_time(house, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(dispatcher, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    house.job()
    spoil_policy(house)
    one = new_dispatcher(house)
    for delay in (5, 10, 20, 40, 80, 160, 300, 300):
        assert one.validate_one()
        assert not one.validate_one()
        now[0] += delay - 1
        assert not one.validate_one()
        now[0] += 1


def test_a_dispatcher_that_cannot_validate_sweeps_all_the_same(house):
    house.job()
    spoil_policy(house)
    file_id, stop = house.file(), threading.Event()
    with house.db.write() as session:
        session.execute(update(File).where(File.id == file_id).values(expires_at=1))
    thread = threading.Thread(target=new_dispatcher(house).run, args=(stop,), daemon=True)
    thread.start()
    end, blob = time.monotonic() + 60, ""
    while blob is not None and time.monotonic() < end:
        time.sleep(0.05)
        with house.db.read() as session:
            blob = session.scalars(select(File.blob).where(File.id == file_id)).one()
    stop.set()
    thread.join(20)
    assert blob is None


def test_projects_take_turns(house):
    many = [house.job() for _ in range(4)]
    another_project(house)
    one = house.job()
    turns = new_dispatcher(house)
    assert turns.validate_one()
    assert turns.validate_one()
    assert [house.get(job_id).status for job_id in (many[0], one, many[1])] == ["queued", "queued", "validating_files"]
    house.dispatch()
    assert {house.get(job_id).status for job_id in many} == {"queued"}


def test_files_of_a_store_that_is_away_are_validated_when_it_is_back(house):
    job_id = house.job()
    store_folder(house).rename(house.folder / "unplugged")
    store_folder(house).mkdir()  # where its disk would be mounted
    house.dispatch()
    assert house.get(job_id).status == "validating_files"
    store_folder(house).rmdir()
    (house.folder / "unplugged").rename(store_folder(house))
    house.dispatch()
    assert house.get(job_id).status == "queued"


def test_a_store_that_goes_away_costs_time_and_no_try(house, monkeypatch):
    plain = house.job()
    house.dispatch()
    house.work()
    monkeypatch.setattr(worker, "FAILED_SECONDS", 0.3)
    job_id = house.job()
    house.dispatch()
    store_folder(house).rename(house.folder / "unplugged")
    assert house.work()
    job = house.get(job_id)
    assert (job.status, job.tries, job.error) == ("queued", 0, None)
    assert any("object store cannot be reached" in text for text in house.messages(job_id))
    (house.folder / "unplugged").rename(store_folder(house))
    end = time.monotonic() + 60
    while not house.work():
        assert time.monotonic() < end
    assert house.visible(job_id) == house.visible(plain)


def test_a_store_that_goes_away_while_a_state_is_saved_ends_no_job(house, monkeypatch):
    monkeypatch.setattr(worker, "FAILED_SECONDS", 0.0)
    plain = house.job()
    house.dispatch()
    house.work()
    job_id, inner = house.job(), Reporter._flush

    def flush(self):
        inner(self)
        if store_folder(house).exists() and not (house.folder / "gone").exists():
            (house.folder / "gone").touch()
            store_folder(house).rename(house.folder / "unplugged")

    house.dispatch()
    monkeypatch.setattr(Reporter, "_flush", flush)
    assert house.work()
    assert (house.get(job_id).status, house.get(job_id).tries) == ("queued", 0)
    (house.folder / "unplugged").rename(store_folder(house))
    assert house.work()
    assert house.visible(job_id) == house.visible(plain)


def test_a_running_job_waits_for_a_version_that_reads_its_policy(house, monkeypatch):
    monkeypatch.setattr(worker, "FAILED_SECONDS", 0.0)
    job_id = house.job()
    house.dispatch()
    policy_id = spoil_policy(house)
    assert house.work()
    assert (house.get(job_id).status, house.get(job_id).tries) == ("queued", 0)
    mend_policy(house, policy_id)
    assert house.work()
    assert house.get(job_id).status == "succeeded"


def test_nobody_takes_a_job_before_its_wait_is_over(house):
    job_id = house.job()
    house.dispatch()
    lease = leases.take(house.db, "w", 30)
    assert lease is not None
    lease.release("set aside", after=200)
    assert house.get(job_id).tries == 0
    assert leases.take(house.db, "w", 30) is None
    with house.db.write() as session:
        session.get_one(Job, house.get(job_id).seq).lease_until -= 200
    lease = leases.take(house.db, "w", 30)
    assert lease is not None
    lease.release("set aside", after=200)
    with house.db.write() as session:  # as after a clock that was set back
        session.get_one(Job, house.get(job_id).seq).lease_until += 86_400
    assert leases.take(house.db, "w", 30) is not None


def charged(house) -> int:
    with house.db.read() as session:
        return quotas.used_today(session, house.tenant["project"], now=clock.now()).get("training_tokens", 0)


def test_a_job_is_charged_once_whoever_trains_it_again(house, monkeypatch):
    """A worker dies after it has told of steps that no saved state has: the next one trains them again."""
    plain = house.job()
    house.dispatch()
    house.work()
    whole = charged(house)
    assert whole == house.get(plain).trained_tokens > 0
    job_id, inner, calls = house.job(), Reporter._flush, []

    def flush(self):
        inner(self)
        calls.append(1)
        if len(calls) == 5:
            raise KeyError("a bug")

    house.dispatch()
    monkeypatch.setattr(Reporter, "_flush", flush)
    monkeypatch.setattr("holdtrue.service.jobs.progress.FLUSH_SECONDS", 0.0)
    house.work()
    assert house.get(job_id).status == "queued"
    assert whole < charged(house) <= 2 * whole
    house.work()
    assert house.get(job_id).status == "succeeded"
    assert charged(house) == 2 * whole


def test_a_job_that_is_cancelled_at_its_last_step_has_trained_for_all_of_them(house, monkeypatch):
    plain = house.job()
    house.dispatch()
    house.work()
    whole = charged(house)
    job_id, inner = house.job(), Reporter._flush

    def flush(self):
        inner(self)
        job = house.get(job_id)
        steps = [event.data["step"] for event in house.all(JobEvent, job_id) if event.type == "metrics"]
        if job.status == "running" and steps and max(steps) == 6:
            with house.db.write() as session:
                lifecycle.request(session, session.get_one(Job, job.seq), "cancel")

    house.dispatch()
    monkeypatch.setattr(Reporter, "_flush", flush)
    house.work()
    assert house.get(job_id).status == "cancelled"
    assert charged(house) == whole + house.get(plain).trained_tokens


def test_a_second_training_is_charged_beside_the_first(house):
    house.policy(gate={"margin_fall": {"max": 1e-9}}, on_fail={"retrain": [{"kl": {"weight": 0.5}}], "then": "hold"})
    job_id = house.job()
    house.dispatch()
    house.work()
    job = house.get(job_id)
    assert job.attempt == 1
    assert charged(house) == job.trained_tokens == job.charged_tokens


def test_a_job_that_alone_would_exceed_the_days_tokens_is_refused_before_it_trains(house):
    plain = house.job()
    house.dispatch()
    house.work()
    whole = charged(house)
    for spare, status in ((0, "succeeded"), (-1, "failed")):
        with house.db.write() as session:
            limits = {"tokens_per_day": charged(house) + whole + spare}
            session.get_one(Project, house.tenant["project"]).limits = limits
        job_id = house.job()
        house.dispatch()
        house.work()
        assert house.get(job_id).status == status
    error = house.get(job_id).error
    assert (error["code"], error["param"]) == ("tokens_per_day", "training_file")
    assert f"would train {whole} tokens, and {whole - 1} of the project's" in error["message"]
    assert charged(house) == 2 * whole == 2 * house.get(plain).trained_tokens


@pytest.mark.parametrize("rows", [[chat("a?", "b.")] * 12 + [{"messages": [{"role": "x"}] * 3}] * 30])
def test_more_faults_than_are_listed_are_said_to_be_at_least_so_many(house, rows):
    job_id = house.job(rows)
    house.dispatch()
    assert "at least" in house.get(job_id).error["message"]
