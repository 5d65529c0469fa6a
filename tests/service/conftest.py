"""Databases: SQLite in a file, and a real PostgreSQL of the tests' own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from holdtrue.service.evidence import signing
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database
from house import House, build_house
from support import free_port

PARTS = ("service/api/", "service/web/", "service/test_serve", "service/test_real_client")
ON_BOTH = ("api/test_tenants", "api/test_attacks", "api/test_sdk", "api/test_races", "web/test_sessions")
"""What of the API and the pages each run tries on PostgreSQL too; the rest is slow there, for `make test-service`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        here = any(part in item.nodeid for part in PARTS)
        if here and "postgresql" in item.nodeid and not any(name in item.nodeid for name in ON_BOTH):
            item.add_marker(pytest.mark.slow)


class Postgres:
    """A cluster in a temporary folder, on the loopback address alone."""

    def __init__(self, bin_dir: Path) -> None:
        # Not below pytest's folder, which root alone may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="holdtrue-postgres-"))
        self.bin, self.port = bin_dir, free_port()
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            self.user = {"user": "nobody", "group": "nogroup"}
        self.own(self.folder)
        self._run("initdb", "-D", self.folder / "data", "-U", "holdtrue", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()

    def own(self, folder: Path) -> None:
        """Give a folder to whom the server runs as, and to nobody else."""
        if self.user:
            shutil.chown(folder, **self.user)
        folder.chmod(0o700)

    def _run(self, program: str, *arguments: object) -> None:
        subprocess.run(
            [self.bin / program, *map(str, arguments)],
            check=True,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            cwd="/",
            **self.user,
        )

    def start(self) -> None:
        options = f"-p {self.port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
        log = self.folder / "log"
        self._run("pg_ctl", "-D", self.folder / "data", "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self.folder / "data", "-w", "-m", "fast", "stop")

    @property
    def url(self) -> str:
        return f"postgresql://holdtrue@127.0.0.1:{self.port}/"

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Make a database; yield its URL, and drop it afterwards."""
        name = f"t{os.urandom(6).hex()}"
        self.administer(f"CREATE DATABASE {name}")
        yield self.url + name
        self.administer(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def administer(self, statement: str) -> None:
        """Execute a statement outside of a transaction, in a database of its own."""
        admin = Database(self.url + "postgres", isolation_level="AUTOCOMMIT")
        with contextlib.closing(admin), admin.engine.connect() as connection:
            connection.execute(text(statement))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL; tests that need one are skipped where it is not installed."""
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed: its programs initdb and pg_ctl are not found")
    server = Postgres(Path(found).resolve().parent)
    yield server
    server.stop()
    shutil.rmtree(server.folder)


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """The URL of a fresh database of that server."""
    with postgres.database() as url:
        yield url


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each database, without a table, as a setting: empty is SQLite in the service's home."""
    if request.param == "sqlite":
        yield ""
        return
    with request.getfixturevalue("postgres").database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh_url(request: pytest.FixtureRequest) -> str:
    """Each database as ``database_url`` has it, for one test alone."""
    return "" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Each database, without a table."""
    sqlite = request.param == "sqlite"
    found = Database(f"sqlite:///{tmp_path / 'service.db'}" if sqlite else request.getfixturevalue("postgres_url"))
    yield found
    found.close()


@pytest.fixture
def chosen(empty_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Each database, with the schema of today, as commands find it with ``--home``: that of ``tmp_path``."""
    if not empty_db.is_sqlite:
        signing.make_key(tmp_path / "signing-key.pem")
        monkeypatch.setenv("HOLDTRUE_SIGNING_KEY", str(tmp_path / "signing-key.pem"))
        monkeypatch.setenv("HOLDTRUE_DATABASE_URL", empty_db.engine.url.set(drivername="postgresql").render_as_string())
    migrations.upgrade(empty_db)
    return empty_db


@pytest.fixture
def db(empty_db: Database) -> Database:
    """Each database, with the schema of today."""
    migrations.upgrade(empty_db)
    return empty_db


@pytest.fixture
def house(db: Database, tmp_path: Path, tiny_dir: Path) -> House:
    """A service without its API, over each database."""
    return build_house(db, tmp_path, tiny_dir)
