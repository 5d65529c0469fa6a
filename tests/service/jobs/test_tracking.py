"""Metrics at Weights & Biases: its own client, without a network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdtrue.service.store.schema import JobEvent
from support import free_port

WANTED = {"wandb": {"project": "door-repair", "entity": None, "name": "first", "tags": ["hinges"]}}
VARIABLES = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def warnings(house, job_id: str) -> list[str]:
    return [event.message for event in house.all(JobEvent, job_id) if event.level == "warn"]


def test_the_steps_metrics_go_there_and_nothing_else(house, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    job_id = house.job(integrations=WANTED)
    house.dispatch()
    assert house.work()
    assert house.get(job_id).status == "succeeded"
    assert warnings(house, job_id) == []
    (kept,) = (house.settings.home / "work").rglob("run-*.wandb")
    assert kept.name == f"run-{job_id}-0.wandb"
    content = kept.read_bytes()
    for part in (b"door-repair", b"hinges", b"kl_term", b"train_loss", b"total_steps"):
        assert part in content
    assert content.count(b"train_loss") >= 6
    for secret in (b"How do I fix", b"turn it", str(house.folder).encode(), b"probes.jsonl"):
        assert secret not in content


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's own file: LevelDB's log format, behind seven bytes of a header."""
    block, header = 32_768, 7
    place, record = header, b""
    while place + header <= len(content):
        if block - place % block < header:  # what is left of a block is too little for a record
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last piece of one
            yield record
            record = b""


@pytest.mark.parametrize("name", [None, "first"])
def test_a_run_without_a_name_is_shown_under_the_jobs_id(house, monkeypatch: pytest.MonkeyPatch, name: str | None):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    job_id = house.job(integrations={"wandb": {"project": "p", "name": name}})
    house.dispatch()
    assert house.work()
    (kept,) = (house.settings.home / "work").rglob("run-*.wandb")
    shown = {Record.FromString(each).run.display_name for each in records(kept.read_bytes())}
    assert shown - {""} == {name or job_id}


def test_where_it_is_not_set_up_the_customer_is_told(house):
    job_id = house.job(integrations=WANTED)
    house.dispatch()
    assert house.work()
    assert house.get(job_id).status == "succeeded"
    assert warnings(house, job_id) == ["W&B is not set up on this service: no metrics are sent there"]


@pytest.mark.slow
def test_a_job_needs_no_answer_from_it(house, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    job_id = house.job(integrations=WANTED)
    house.dispatch()
    assert house.work()
    assert house.get(job_id).status == "succeeded"
    assert warnings(house, job_id) == ["W&B did not take the run: no metrics are sent there"]
