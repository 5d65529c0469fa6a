"""Metrics at Weights & Biases: its own client, without a network."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from holdtrue.service.jobs import tracking
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


class Listener:
    """A web server that counts who comes, and has nothing for anybody."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        calls = self.calls

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                calls.append(self.path)
                self.send_error(404)

            do_GET = do_POST  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.slow
def test_no_address_in_an_integration_is_called(house, monkeypatch: pytest.MonkeyPatch):
    """A worker speaks to the provider's W&B, whatever a customer writes; the trap shows that it would have noticed."""
    house.offer()
    file_id, api = house.file(), house.api()
    with contextlib.closing(Listener()) as provider, contextlib.closing(Listener()) as trap:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{provider.address}")
        monkeypatch.setattr(tracking, "SECONDS", 5.0)
        url = f"http://{trap.address}/"
        for wandb in (
            {"project": "p", "entity": trap.address, "name": url, "tags": [url]},
            {"project": url, "entity": url},
        ):
            body = {"model": house.base, "training_file": file_id, "hyperparameters": {"n_epochs": 1}}
            made = api.post("/v1/fine_tuning/jobs", json={**body, "integrations": [{"type": "wandb", "wandb": wandb}]})
            assert made.status_code == 200, made.text
            house.dispatch()
            assert house.work()
            assert house.get(made.json()["id"]).status == "succeeded"
            assert warnings(house, made.json()["id"]) == ["W&B did not take the run: no metrics are sent there"]
        assert provider.calls
        assert not trap.calls
        httpx.get(url)
        assert trap.calls == ["/"]


@pytest.mark.slow
def test_a_job_needs_no_answer_from_it(house, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    job_id = house.job(integrations=WANTED)
    house.dispatch()
    assert house.work()
    assert house.get(job_id).status == "succeeded"
    assert warnings(house, job_id) == ["W&B did not take the run: no metrics are sent there"]
