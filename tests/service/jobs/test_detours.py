"""Killed where a job goes a way of its own: through a screen, on from another model, into a second training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdtrue.service.jobs.worker import Worker
from holdtrue.service.store.schema import Model

from .test_faults import MARK, expire, killed, other_host, story
from .test_jobs import NO_FALL
from .test_screen import SCREEN


def screened(house) -> dict[str, Any]:
    house.policy(screen={**SCREEN, "max_projection": 1e9})
    return {}


def continued(house) -> dict[str, Any]:
    first = house.job()
    house.dispatch()
    house.work()
    parent = next(model for model in house.all(Model, first) if model.kind == "tuned")
    return {"parent": parent.id, "model": parent.name}


def retrained(house) -> dict[str, Any]:
    house.policy(gate=NO_FALL, on_fail={"retrain": [{"kl": {"weight": 0.5}}], "then": "hold"})
    return {}


WAYS = [
    (screened, (MARK, "before", 1, "screen")),
    (screened, (MARK, "after", 1, "screen")),
    (screened, ("holdtrue.screening.screener:Screener.screen", "before", 1)),
    (screened, ("holdtrue.screening.screener:Screener.screen", "after", 1)),
    (screened, (MARK, "before", 1, "gate")),
    (continued, ("holdtrue.service.store.blobs:Blobs.fetch_tree", "before", 1)),
    (continued, ("holdtrue.service.store.blobs:Blobs.fetch_tree", "after", 1)),
    (continued, (MARK, "after", 1, "train")),
    (retrained, ("holdtrue.service.jobs.publish:_decide", "after", 1)),
    (retrained, ("holdtrue.service.jobs.worker:publish", "after", 1)),
    (retrained, ("holdtrue.runs.directory:Run.create", "after", 2)),
    (retrained, (MARK, "before", 2, "prepare")),
    (retrained, (MARK, "after", 2, "train")),
    (retrained, ("holdtrue.service.jobs.publish:_end", "after", 1)),
]
FEW = {9}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("way", "point"),
    [pytest.param(*each, marks=() if n in FEW else pytest.mark.slow) for n, each in enumerate(WAYS)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_killed_on_a_way_of_its_own_equals_undisturbed(house, cache, monkeypatch, way, point):
    monkeypatch.setenv("HOLDTRUE_CACHE", str(cache))
    values = way(house)
    plain = house.job(**values)
    house.dispatch()
    house.work()
    ended = house.get(plain)
    assert (ended.status, ended.held) == (("running", True) if way is retrained else ("succeeded", False)), ended.error
    job_id = house.job(**values)
    house.dispatch()
    killed(house, "worker", point)
    assert house.get(job_id).status == "running"
    assert house.all(Model, job_id) == []
    expire(house, job_id)
    assert Worker(other_host(house), db=house.db, blobs=house.blobs).work_one()
    assert house.visible(job_id) == house.visible(plain)
    assert story(house, job_id) == story(house, plain)
    assert not house.work()
