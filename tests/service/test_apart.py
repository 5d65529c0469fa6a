"""Every role a process of its own, as on several hosts: each has its own home, and they share no disk."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

from holdtrue.cli.main import main
from holdtrue.service import clock, ids
from holdtrue.service.evidence import signing
from holdtrue.service.policy import store as policies
from holdtrue.service.store.schema import Model
from house import ROWS, WORDS
from support import free_port, probe_rows, write_rows

from .api.conftest import Server, start, stop
from .store import s3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
pytest.importorskip("s3fs")


@dataclass
class Fleet:
    """A service of several hosts, as far as one machine can be several: PostgreSQL and a store are all they share."""

    server: Server
    environment: dict[str, str]
    folder: Path
    bucket: s3.S3
    roles: list[tuple[str, subprocess.Popen[bytes]]]

    def start(self, role: str, name: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a role with a home of its own."""
        command = [sys.executable, "-m", "holdtrue.cli.main", "serve", "--role", role]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--home", self.folder / name],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment, **environment},
            )
        self.roles.append((name, process))
        return process

    def wait(self, client: OpenAI, job_id: str, *statuses: str) -> str:
        """Wait until a job has one of the statuses; return it."""
        end = time.monotonic() + 400
        while (status := client.fine_tuning.jobs.retrieve(job_id).status) not in statuses:
            assert time.monotonic() < end, (status, self.said())
            time.sleep(0.2)
        return status

    def said(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))


@pytest.fixture
def fleet(postgres_url: str, tmp_path: Path) -> Iterator[Fleet]:
    signing.make_key(tmp_path / "shared.pem")
    with s3.serving() as bucket:
        environment = {
            **bucket.environment,
            "HOLDTRUE_DATABASE_URL": postgres_url,
            "HOLDTRUE_BLOB_URL": "s3://bucket/holdtrue",
            "HOLDTRUE_SIGNING_KEY": str(tmp_path / "shared.pem"),
            "HOLDTRUE_INFERENCE_URL": f"http://127.0.0.1:{free_port()}",
            "HOLDTRUE_INFERENCE_SECRET": secrets.token_urlsafe(32),
            "HOLDTRUE_LEASE_SECONDS": "3",
            "HOLDTRUE_THREADS": "1",
        }
        found = Fleet(start(tmp_path / "api", **environment), environment, tmp_path, bucket, [])
        yield found
        for _, process in found.roles:
            if process.poll() is None:
                process.terminate()
        codes = {name: process.wait(60) for name, process in found.roles}
        assert stop(found.server) == 0
        assert {code for name, code in codes.items() if name != "killed"} <= {0}, found.said()


def put_in_force(server: Server, base: str, folder: Path) -> None:
    """Offer a tiny model as a base, under a policy that measures it on probes of its own."""
    document = {
        "base_model": base,
        "defenses": [{"kl": {"weight": 0.1, "tokens": "response"}}],
        "adapter": {"r": 4, "alpha": 8},
        "training": {"micro_batch_size": 2, "max_length": 128, "save_every": 2, "warmup_steps": 1},
        "hyperparameters": {"n_epochs": {"auto": 2, "max": 40}, "batch_size": {"auto": 4, "max": 8}},
        "evaluate": {
            "suites": ["likelihood"],
            "data": {"likelihood": str(write_rows(folder / "probes.jsonl", probe_rows(WORDS[:6])))},
        },
        "gate": {"margin_fall": {"max": 50.0}},
    }
    now = clock.now()
    with server.db.write() as session:
        session.add(Model(id=ids.new("model"), name=base, kind="base", status="ready", base_model=base, created_at=now))
        session.flush()
        policies.activate(
            session, policies.save(session, yaml.safe_dump(document), actor="test", now=now), actor="test", now=now
        )


def test_four_roles_apart_train_release_answer_and_verify(
    fleet: Fleet, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put_in_force(fleet.server, str(tiny_dir), tmp_path)
    fleet.start("inference", "inference")
    fleet.start("dispatcher", "dispatcher")
    lost = fleet.start("worker", "killed")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with fleet.server.client(max_retries=30, timeout=120) as client:
        upload = client.uploads.upload_file_chunked(
            file=rows, mime_type="text/jsonl", purpose="fine-tune", part_size=500
        )
        assert upload.file is not None
        assert client.files.content(upload.file.id).read() == rows.read_bytes()
        job = client.fine_tuning.jobs.create(
            model=str(tiny_dir), training_file=upload.file.id, suffix="apart", hyperparameters={"n_epochs": 20}
        )
        fleet.wait(client, job.id, "running")
        until_trained(client, job.id, steps=4)
        os.kill(lost.pid, signal.SIGKILL)
        fleet.start("worker", "worker")  # on another host: it has nothing of the first one's disk
        assert fleet.wait(client, job.id, "succeeded", "failed") == "succeeded", fleet.said()
        steps = [event.data["step"] for event in events(client, job.id) if event.type == "metrics"]
        assert sorted(steps) == list(range(1, 61))
        name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
        assert name is not None
        raw = client.chat.completions.with_raw_response.create(
            model=name, messages=[{"role": "user", "content": "How do I fix a door?"}], max_tokens=5
        )
        assert raw.parse().usage.completion_tokens >= 1
        result = client.fine_tuning.jobs.retrieve(job.id).result_files[0]
        assert client.files.content(result).text.startswith("step,train_loss")
    for variable, value in fleet.environment.items():
        monkeypatch.setenv(variable, value)
    assert main(["verify", name, "--home", str(tmp_path / "elsewhere")]) == 0
    assert not list(tmp_path.rglob("blobs")), "the store is the bucket alone"
    assert not list(tmp_path.rglob(signing.HOME_KEY)), "no host has made a key of its own"
    assert len(fleet.bucket.objects) > 3


def events(client: OpenAI, job_id: str) -> list:
    return list(client.fine_tuning.jobs.list_events(job_id, limit=100))


def until_trained(client: OpenAI, job_id: str, steps: int) -> None:
    for _ in range(600):
        if sum(event.type == "metrics" for event in events(client, job_id)) >= steps:
            return
        time.sleep(0.1)
    pytest.fail("no steps")
