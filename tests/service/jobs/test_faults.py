"""Processes killed anywhere, a database that restarts, a full disk, a clock that steps: nobody can tell afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from holdtrue.errors import RunError
from holdtrue.service import clock
from holdtrue.service.jobs import leases, publish, worker
from holdtrue.service.jobs.dispatcher import Dispatcher
from holdtrue.service.jobs.keeping import Keeper
from holdtrue.service.jobs.progress import Reporter
from holdtrue.service.jobs.worker import Worker
from holdtrue.service.serve import environment
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import retention
from holdtrue.service.store.schema import File, Job, JobEvent, JobState, Model
from holdtrue.training.trainer import DefendedTrainer
from house import ROWS
from small_disk import fill, mounted

from ..api.conftest import BASE, ROW, settings_of, start, stop

KILLED = Path(__file__).with_name("killed.py")
MARK = "holdtrue.runs.directory:Run.mark"
POINTS = [
    ("holdtrue.service.store.blobs:Blobs.fetch", "before", 1),
    ("holdtrue.service.store.blobs:Blobs.fetch", "after", 1),
    *(
        (MARK, when, 1, stage)
        for stage in ("prepare", "train", "finalise", "evaluate", "gate")
        for when in ("before", "after")
    ),
    ("holdtrue.service.jobs.progress:Reporter.tell", "before", 4),
    ("holdtrue.service.jobs.progress:Reporter._flush", "before", 6),
    ("holdtrue.training.fitting:_Recorder.on_log", "after", 4),
    ("holdtrue.training.trainer:seal", "before", 2),
    ("holdtrue.training.trainer:seal", "after", 2),
    ("holdtrue.service.jobs.snapshot:save_rest", "after", 2),
    ("holdtrue.service.jobs.keeping:_checkpoint_row", "after", 1),
    ("holdtrue.service.store.blobs:Blobs.delete", "before", 2),
    ("holdtrue.runs.evaluate:measure_tasks", "after", 1),
    ("holdtrue.runs.gate:_margin", "after", 1),
    ("holdtrue.service.store.blobs:Blobs.put_tree", "after", 1),
    ("holdtrue.service.jobs.publish:result_csv", "after", 1),
    ("holdtrue.service.jobs.publish:_model", "after", 1),
    ("holdtrue.service.jobs.publish:_end", "before", 1),
    ("holdtrue.service.jobs.publish:_end", "after", 1),
    ("holdtrue.service.jobs.worker:publish", "after", 1),
    ("holdtrue.training.trainer:DefendedTrainer.training_step", "before", 6),  # of two micro-batches a step
]
FEW = {6, 12, 27}
"""Which of them every run of the tests tries; all are tried with those that are marked slow."""


def other_host(house):
    """Return the settings of a worker that shares database and store, and nothing else."""
    return house.settings.model_copy(
        update={
            "home": house.folder / "elsewhere",
            "blob_url": house.settings.blobs,
            "signing_key": house.settings.home / "signing-key.pem",
        }
    )


def killed(house, role: str, point: tuple) -> None:
    done = subprocess.run(
        [sys.executable, KILLED, role, *map(str, point)],
        env={**os.environ, **environment(house.settings), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


@contextlib.contextmanager
def dying(settings: ServiceSettings, point: tuple) -> Iterator[str]:
    """An API that is killed at a point of the one request that it gets; yields its address."""
    command = [sys.executable, KILLED, "api", *map(str, point)]
    with subprocess.Popen(command, env={**os.environ, **environment(settings)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().split()[-1]
        assert process.wait(30) == -signal.SIGKILL


def expire(house, job_id: str) -> None:
    with house.db.write() as session:
        session.get(Job, house.get(job_id).seq).lease_until = 1.0


def story(house, job_id: str) -> list[str]:
    return [text for text in house.messages(job_id) if "another takes over" not in text and job_id not in text]


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=() if n in FEW else pytest.mark.slow) for n, p in enumerate(POINTS)], ids=str
)
def test_killed_anywhere_equals_undisturbed(house, point):
    plain = house.job()
    house.dispatch()
    house.work()
    assert house.get(plain).status == "succeeded", house.get(plain).error
    job_id = house.job()
    house.dispatch()
    killed(house, "worker", point)
    at_once = point[0].endswith("worker:publish")  # killed after the job's end
    assert (house.get(job_id).status == "succeeded") == at_once
    assert bool(house.all(Model, job_id)) == at_once  # nothing half-visible
    expire(house, job_id)
    assert Worker(other_host(house), db=house.db, blobs=house.blobs).work_one() != at_once
    assert house.visible(job_id) == house.visible(plain)
    assert story(house, job_id) == story(house, plain)


@pytest.mark.parametrize(("when", "call"), [("after", 1), ("before", 2), ("after", 2)])
def test_killed_around_a_validation_equals_undisturbed(house, when, call):
    validation = house.file(ROWS[:5])
    plain, job_id = (house.job(validation_file=validation) for _ in range(2))
    house.dispatch()
    house.work()
    killed(house, "worker", ("holdtrue.training.trainer:DefendedTrainer.evaluate", when, call))
    expire(house, job_id)
    assert Worker(other_host(house), db=house.db, blobs=house.blobs).work_one()
    assert house.get(job_id).status == "succeeded"
    assert house.visible(job_id) == house.visible(plain)
    assert story(house, job_id) == story(house, plain)


LONG = b"".join(json.dumps(row).encode() + b" " * 100_000 + b"\n" for row in ROWS)
"""Rows of more than the one piece in which content is copied."""


def test_killed_inside_a_download_equals_undisturbed(house):
    plain = house.job(LONG)
    house.dispatch()
    house.work()
    assert house.get(plain).status == "succeeded", house.get(plain).error
    job_id = house.job(LONG)
    house.dispatch()
    killed(house, "worker", ("holdtrue.service.store.away:Reading.read", "before", 2))
    (half,) = (house.settings.home / "work" / job_id).rglob(".training_file.jsonl.*")
    assert 0 < half.stat().st_size < len(LONG)
    expire(house, job_id)
    assert Worker(other_host(house), db=house.db, blobs=house.blobs).work_one()
    assert house.visible(job_id) == house.visible(plain)
    assert story(house, job_id) == story(house, plain)


@pytest.mark.parametrize(
    ("point", "further"),
    [
        (("holdtrue.service.jobs.keeping:Keeper.save", "after", 2), True),
        (("holdtrue.service.store.blobs:Blobs.fetch", "before", 1), False),
    ],
    ids=["further", "nowhere"],
)
def test_a_job_is_given_up_only_where_its_workers_die_without_getting_further(house, point, further):
    job_id = house.job()
    house.dispatch()
    with house.db.write() as session:
        session.get_one(Job, house.get(job_id).seq).tries = leases.MOST_TRIES - 1
    killed(house, "worker", point)
    assert house.get(job_id).tries == (1 if further else leases.MOST_TRIES)
    expire(house, job_id)
    assert house.work() == further
    assert house.get(job_id).status == ("succeeded" if further else "failed")


def test_a_save_of_nothing_new_is_not_further(house, monkeypatch):
    """A minute of a stage is worth saving; what dies in it again and again is given up all the same."""
    monkeypatch.setattr(Keeper, "SECONDS", 0.0)
    job_id, inner = house.job(), Reporter.tell
    house.dispatch()

    def tell(self, fields):
        inner(self, fields)
        raise SystemExit

    monkeypatch.setattr(Reporter, "tell", tell)
    for tries in range(1, leases.MOST_TRIES + 1):
        with pytest.raises(SystemExit):
            house.work()
        assert house.all(JobState, job_id) != []
        assert house.get(job_id).tries == tries
        expire(house, job_id)
    assert not house.work()
    assert house.get(job_id).status == "failed"


VALIDATED = [
    ("holdtrue.service.store.blobs:Blobs.fetch", "before", 1),
    ("holdtrue.service.jobs.dispatcher:validate_chat", "after", 1),
    ("holdtrue.service.jobs.lifecycle:move", "after", 1),
    ("holdtrue.service.jobs.dispatcher:Dispatcher.validate_one", "after", 1),
]


@pytest.mark.parametrize("point", VALIDATED, ids=str)
def test_a_dispatcher_killed_anywhere_is_followed_by_another(house, point):
    plain = house.job()
    house.dispatch()
    job_id = house.job()
    killed(house, "dispatcher", point)
    done = point[0].endswith("validate_one")
    assert house.get(job_id).status == ("queued" if done else "validating_files")
    house.dispatch()
    assert house.get(job_id).status == "queued"
    assert story(house, job_id) == story(house, plain)
    assert house.get(job_id).resolved == house.get(plain).resolved


REMOVED = [
    ("holdtrue.service.store.blobs:Blobs.delete", "before", 1),
    ("holdtrue.service.store.blobs:Blobs.delete", "after", 1),
    ("holdtrue.service.store.retention:sweep", "after", 1),
]


@pytest.mark.parametrize("point", REMOVED, ids=str)
def test_a_dispatcher_killed_while_it_removes_leaves_nothing(house, point):
    """A file's row is changed first: killed between, its content is found later by a look through the store."""
    file_id = house.file()
    with house.db.write() as session:
        row = session.scalars(select(File).where(File.id == file_id)).one()
        key, row.expires_at = row.blob, 1
    killed(house, "dispatcher", point)
    later = clock.now() + retention.GRACE_SECONDS + 60  # by then what no row names is nobody's upload under way
    retention.sweep(house.db, house.blobs, round(later), house.settings)
    assert not house.blobs.exists(key)
    with house.db.read() as session:
        row = session.scalars(select(File).where(File.id == file_id)).one()
        assert row.blob is None
        assert row.deleted_at is not None


CREATED = [
    ("holdtrue.service.jobs.lifecycle:create", "after", 1),
    ("holdtrue.service.api.jobs:_create", "after", 1),
    ("holdtrue.service.api.edge:_Exchange.send", "before", 1),
]


@pytest.mark.parametrize("point", CREATED, ids=str)
def test_a_job_asked_for_of_an_api_that_is_killed_is_there_once(tmp_path: Path, fresh_url: str, point):
    home = tmp_path / "home"
    server = start(home, HOLDTRUE_DATABASE_URL=fresh_url)
    with server.client() as client:
        file_id = client.files.create(file=("a.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
    stop(server)
    body = {"model": BASE, "training_file": file_id}
    headers = {"authorization": f"Bearer {server.key}", "idempotency-key": "k1"}
    with dying(settings_of(home, fresh_url), point) as url, pytest.raises(httpx.TransportError):
        httpx.post(f"{url}/fine_tuning/jobs", json=body, headers=headers, timeout=60)
    again = start(home, key=server.key, HOLDTRUE_DATABASE_URL=fresh_url)
    try:
        with again.client() as client:
            kept = [job.id for job in client.fine_tuning.jobs.list()]
            assert len(kept) == point[0].endswith("send")
            job = client.fine_tuning.jobs.create(**body, extra_headers={"Idempotency-Key": "k1"})
            assert [each.id for each in client.fine_tuning.jobs.list()] == [job.id]
            assert not kept or kept == [job.id]
            told = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
            assert sorted(told) == ["Created fine-tuning job: " + job.id, "Validating the files"]
    finally:
        stop(again)


def test_an_upload_to_an_api_that_is_killed_leaves_nothing(tmp_path: Path, fresh_url: str):
    home = tmp_path / "home"
    server = start(home, HOLDTRUE_DATABASE_URL=fresh_url)
    headers = {"authorization": f"Bearer {server.key}", "content-type": "multipart/form-data; boundary=x"}

    def half():
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\n'
        yield b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + (ROW * 20_000).encode()
        server.process.kill()
        server.process.wait()
        yield (ROW * 20_000).encode()

    with pytest.raises(httpx.TransportError):
        httpx.post(f"{server.url}/files", content=half(), headers=headers, timeout=60)
    again = start(home, key=server.key, HOLDTRUE_DATABASE_URL=fresh_url)
    try:
        with again.client() as client:
            assert client.files.list().data == []
            assert client.files.create(file=("a.jsonl", ROW.encode()), purpose="fine-tune").bytes == len(ROW)
        kept = [path for path in home.rglob("*") if path.is_file() and path.stat().st_size > len(ROW) * 1000]
        assert [path for path in kept if "service.db" not in path.name] == []
    finally:
        stop(again)


def test_postgresql_restarted_in_the_middle_loses_and_doubles_nothing(postgres, house, monkeypatch):
    if house.db.is_sqlite:
        pytest.skip("nothing to restart")
    plain = house.job()
    house.dispatch()
    house.work()
    monkeypatch.setattr(worker, "FAILED_SECONDS", 0.2)
    inner, calls = Reporter._flush, []

    def flush(self):
        calls.append(1)
        if len(calls) == 3:
            postgres.stop()
            threading.Timer(1.0, postgres.start).start()
        inner(self)

    monkeypatch.setattr(Reporter, "_flush", flush)
    job_id, stopping = house.job(), threading.Event()
    roles = [each(house.settings, db=house.db, blobs=house.blobs).run for each in (Worker, Dispatcher)]
    threads = [threading.Thread(target=run, args=(stopping,), daemon=True) for run in roles]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    status = "validating_files"
    while status != "succeeded" and time.monotonic() < deadline:
        time.sleep(0.2)
        with contextlib.suppress(OperationalError):
            status = house.get(job_id).status
    stopping.set()
    for thread in threads:
        thread.join(30)
    assert len(calls) > 3
    assert house.visible(job_id) == house.visible(plain)
    assert house.get(job_id).tries == house.get(plain).tries
    told = [text for text in story(house, job_id) if "does not answer" not in text and "running" not in text]
    assert told == [text for text in story(house, plain) if "running" not in text]


@pytest.mark.parametrize("step", [86_400.0, -86_400.0])
def test_a_clock_that_steps_costs_a_takeover_at_most(house, monkeypatch, step):
    """Leases go by the clock that all hosts share: over PostgreSQL that is its own, and a host's costs nothing."""
    plain = house.job()
    house.dispatch()
    house.work()
    job_id = house.job()
    house.dispatch()
    hosts, database, seen, taken, inner, shared = [0.0], [0.0], [], [], Reporter._flush, clock.shared
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(time=lambda: time.time() + hosts[0]))
    monkeypatch.setattr(clock, "shared", lambda session: shared(session) + database[0])

    def held() -> tuple:
        job = house.get(job_id)
        return job.status, job.lease_owner, job.fence, job.tries

    def take():
        return leases.take(house.db, "other", house.settings.lease_seconds)

    def flush(self):
        inner(self)
        if not taken and house.get(job_id).stage == "train":
            before, hosts[0] = held(), step
            if not house.db.is_sqlite:
                seen.extend([take(), held() == before])
                database[0] = step
            taken.append(take())

    monkeypatch.setattr(Reporter, "_flush", flush)
    assert house.work()
    assert seen == ([] if house.db.is_sqlite else [None, True])
    assert taken[0] is not None  # the other cannot know better, and the first has noticed
    assert house.get(job_id).status == "running"
    assert house.get(job_id).lease_owner == "other"
    expire(house, job_id)
    assert house.work()
    assert house.visible(job_id) == house.visible(plain)
    assert story(house, job_id) == story(house, plain)


def test_a_zombie_writes_nothing_after_its_lease(house, monkeypatch):
    """A worker stops just before it publishes, its lease runs out, another ends the job; then the first wakes."""
    job_id = house.job()
    house.dispatch()
    asleep, wake, inner = threading.Event(), threading.Event(), publish.publish

    def slow(*args):
        if not asleep.is_set():
            asleep.set()
            assert wake.wait(120)
        return inner(*args)

    monkeypatch.setattr(worker, "publish", slow)
    monkeypatch.setattr(leases.Lease, "renew", lambda self: "run")
    zombie = threading.Thread(target=house.work, daemon=True)
    zombie.start()
    assert asleep.wait(60)
    expire(house, job_id)
    assert Worker(other_host(house), db=house.db, blobs=house.blobs).work_one()
    ended = (house.visible(job_id), house.messages(job_id))
    assert house.get(job_id).status == "succeeded"
    wake.set()
    zombie.join(60)
    assert (house.visible(job_id), house.messages(job_id)) == ended


def test_a_full_disk_gives_the_job_back_and_says_so(house, monkeypatch):
    job_id = house.job()
    house.dispatch()
    inner, calls = house.blobs.put, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return inner(*args, **kwargs)

    monkeypatch.setattr(house.blobs, "put", full)
    monkeypatch.setattr(worker, "FAILED_SECONDS", 0.0)
    house.work()
    assert house.get(job_id).status == "queued"
    assert any("storage is full" in text for text in house.messages(job_id))
    house.work()
    assert house.get(job_id).status == "succeeded"
    steps = [e.data["step"] for e in house.all(JobEvent, job_id) if e.type == "metrics"]
    assert steps == sorted(set(steps))


def test_a_workers_disk_that_is_full_gives_the_job_back(house, monkeypatch):
    """Torch has words of its own for a disk that has room for the adapter, and none for the optimizer's state."""
    monkeypatch.setattr(worker, "FAILED_SECONDS", 0.0)
    plain = house.job()
    house.dispatch()
    house.work()
    job_id, work = house.job(), house.settings.home / "work"
    house.dispatch()
    shutil.rmtree(work)
    inner, filled = DefendedTrainer._save_optimizer_and_scheduler, []

    def full(self, folder):
        if not filled:
            filled.append(fill(work))
        inner(self, folder)

    monkeypatch.setattr(DefendedTrainer, "_save_optimizer_and_scheduler", full)
    with mounted(work, "64m"):
        assert house.work()
        job = house.get(job_id)
        assert (job.status, job.tries, job.error) == ("queued", 0, None)
        assert house.messages(job_id)[-1] == "The service's storage is full; the job goes on when there is room"
        assert not any("MiB" in text or "/" in text.replace("/6:", "") for text in house.messages(job_id))
        filled[0].unlink()
        assert house.work()
    assert house.visible(job_id) == house.visible(plain)


@pytest.mark.parametrize("error", [RunError("the model cannot be loaded: out of memory"), MemoryError()], ids=str)
def test_a_worker_that_fails_for_a_reason_of_its_own_costs_a_try(house, monkeypatch, error):
    job_id, inner, failures = house.job(), worker.execute, []

    def execute(run, control, **options):
        if len(failures) < 2:
            failures.append(1)
            raise error
        return inner(run, control, **options)

    house.dispatch()
    monkeypatch.setattr(worker, "execute", execute)
    for tries in (1, 2):
        assert house.work()
        job = house.get(job_id)
        assert (job.status, job.tries, job.error) == ("queued", tries, None)
    assert not any("memory" in text for text in house.messages(job_id))
    assert not house.work()  # left alone for a while
    with house.db.write() as session:
        session.get_one(Job, job.seq).lease_until = None
    assert house.work()
    assert house.get(job_id).status == "succeeded"


def test_training_that_diverges_fails_its_job_at_once(house):
    house.policy(training={"learning_rate": 1e30, "micro_batch_size": 2, "max_length": 128, "warmup_steps": 0})
    job_id = house.job()
    house.dispatch()
    assert house.work()
    job = house.get(job_id)
    assert (job.status, job.error["code"]) == ("failed", "training_error")
    assert "diverged" in job.error["message"]
