"""Jobs under a policy that screens the training file before anything is trained on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdtrue.service.store.schema import GateDecision, JobCheckpoint, JobEvent, Model, Receipt

SCREEN = {"rows": 6, "tokens": 6, "indicators": ["projection"]}
"""The quickest indicator, on a few rows; what it says of a tiny model of random weights means nothing."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(cache))


def stages(house, job_id: str) -> list[str]:
    return [event.data["stage"] for event in house.all(JobEvent, job_id) if event.data and "stage" in event.data]


def test_rows_within_the_limit_are_trained_on(house):
    house.policy(screen={**SCREEN, "max_projection": 1e9})
    job_id = house.job()
    house.dispatch()
    assert house.work()
    assert (house.get(job_id).status, house.get(job_id).error) == ("succeeded", None)
    assert stages(house, job_id) == ["screen", "prepare", "train", "finalise", "evaluate", "gate"]
    assert [(model.kind, model.status) for model in house.all(Model, job_id)] == [
        ("tuned", "ready"),
        ("checkpoint", "ready"),
    ]
    assert len(house.all(JobCheckpoint, job_id)) == 2


def test_rows_beyond_the_limit_fail_the_job_before_training(house):
    house.policy(screen={**SCREEN, "max_projection": -1e9})
    job_id = house.job()
    house.dispatch()
    assert house.work()
    job = house.get(job_id)
    assert job.status == "failed"
    assert job.error["code"] == "screening"
    assert job.error["param"] == "training_file"
    assert "projection is" in job.error["message"]
    assert job.trained_tokens is None
    assert stages(house, job_id) == ["screen"]
    for table in (Model, JobCheckpoint, GateDecision, Receipt):
        assert house.all(table, job_id) == []
    assert not house.work(), "it is not tried again"
    told = json.dumps([job.error, house.messages(job_id)])
    assert str(house.folder) not in told


def test_a_refused_customer_is_told_what_a_customer_can_do(house):
    """No word of the provider's spec, its files, or options of a command that the customer does not run."""
    house.policy(screen={**SCREEN, "max_projection": -1e9})
    job_id = house.job()
    house.dispatch()
    house.work()
    message = house.get(job_id).error["message"]
    for word in ("--out", "spec", "screen.json", "raise the limit"):
        assert word not in message
