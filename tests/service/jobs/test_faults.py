"""A worker killed anywhere: another, on another host, ends the job, and nobody can tell from what is visible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from holdtrue.service.jobs import leases, publish, worker
from holdtrue.service.jobs.worker import Worker
from holdtrue.service.serve import environment
from holdtrue.service.store.schema import Job, JobEvent, Model

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
    ("holdtrue.service.jobs.worker:_checkpoint_row", "after", 1),
    ("holdtrue.service.store.blobs:Blobs.delete", "before", 2),
    ("holdtrue.runs.evaluate:measure_tasks", "after", 1),
    ("holdtrue.runs.gate:_margin", "after", 1),
    ("holdtrue.service.store.blobs:Blobs.put_tree", "after", 1),
    ("holdtrue.service.jobs.publish:result_csv", "after", 1),
    ("holdtrue.service.jobs.publish:_model", "after", 1),
    ("holdtrue.service.jobs.publish:_end", "before", 1),
    ("holdtrue.service.jobs.publish:_end", "after", 1),
    ("holdtrue.service.jobs.worker:publish", "after", 1),
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
    done = subprocess.run(
        [sys.executable, KILLED, *map(str, point)],
        env={**os.environ, **environment(house.settings), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    at_once = point[0].endswith("worker:publish")  # killed after the job's end
    assert (house.get(job_id).status == "succeeded") == at_once
    assert bool(house.all(Model, job_id)) == at_once  # nothing half-visible
    expire(house, job_id)
    assert Worker(other_host(house), db=house.db, blobs=house.blobs).work_one() != at_once
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
