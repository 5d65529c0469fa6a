from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from holdtrue.service import auth, clock, tenancy
from holdtrue.service.evidence import signing
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.database import Database

ROW = '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}\n'
BASE = "smollm2-135m-instruct"


@dataclass
class Server:
    """A service's API in a process of its own, with its database open beside it."""

    url: str
    key: str
    home: Path
    db: Database
    process: subprocess.Popen[str]
    log: Path

    def client(self, key: str | None = None, **options) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key or self.key, **{"max_retries": 0, **options})

    def peak(self) -> int:
        """Return the most memory that the process has held, in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

    def tenant(self, slug: str, **limits: int) -> str:
        """Make an organization with one project and a member's key."""
        now = clock.now()
        with self.db.write() as session:
            organization = tenancy.create_organization(session, slug, slug, now=now)
            project = tenancy.create_project(session, organization.id, slug, now=now)
            project.limits = limits
            return auth.create(session, project_id=project.id, name=slug, role="admin", now=now).secret


def settings_of(home: Path, database_url: str = "") -> ServiceSettings:
    """Return the settings of a service in that home; over PostgreSQL its signing key lies beside the home."""
    signing_key = home.with_suffix(".pem") if database_url.startswith("postgresql") else None
    return ServiceSettings(home=home, port=0, database_url=database_url, signing_key=signing_key)


def start(home: Path, *options: str, role: str = "api", key: str = "", **environment: str) -> Server:
    """Start a service; one that was started before prints no key again, and ``key`` is the one it has."""
    log = home.with_suffix(".log")
    database = environment.get("HOLDTRUE_DATABASE_URL", "")
    key_file = settings_of(home, database).signing_key
    if key_file is not None:
        signing.make_key(key_file)
        environment.setdefault("HOLDTRUE_SIGNING_KEY", str(key_file))
    process = subprocess.Popen(
        [sys.executable, "-m", "holdtrue.cli.main", "serve", "--role", role, "--port", "0", "--home", home, *options],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    url = re.fullmatch(r"holdtrue serves (http\S+)\n", process.stdout.readline())
    assert url, log.read_text()
    if not key:
        found = re.fullmatch(r"first key, shown only now: (sk-\w{48})\n", process.stdout.readline())
        key = found[1] if found else ""
    return Server(url[1], key, home, Database(settings_of(home, database).database), process, log)


def stop(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    server.db.close()
    return server.process.wait(40)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An API over each database."""
    environment = {"HOLDTRUE_UPLOAD_BYTES": str(4 * 2**20)}
    with contextlib.ExitStack() as stack:
        if request.param == "postgresql":
            made = request.getfixturevalue("postgres").database()
            environment["HOLDTRUE_DATABASE_URL"] = stack.enter_context(made)
        found = start(tmp_path_factory.mktemp("service") / "home", **environment)
        yield found
        stop(found)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="session")
def file_id(server: Server) -> str:
    with server.client() as client:
        return client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id


@pytest.fixture(scope="session")
def strangers_key(server: Server) -> str:
    return server.tenant("stranger")
