"""The schema's versions: up at every start, down by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.resources import files

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from holdtrue.errors import RunError
from holdtrue.service.store.database import Database

_LOCK = 0x6D696772
"""The advisory lock under which PostgreSQL is migrated; SQLite's one writer is lock enough."""


def upgrade(db: Database, revision: str = "head") -> None:
    """Bring the schema up to a revision; any number of processes may call this at once.

    Raises:
        RunError: the database was made by a later version of holdtrue.
    """
    with _connection(db) as (connection, config):
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        now = MigrationContext.configure(connection).get_current_revision()
        if now is not None and now not in known:
            raise RunError(
                f"the database is at revision {now}, which this version of holdtrue does not know: update it"
            )
        command.upgrade(config, revision)


def downgrade(db: Database, revision: str) -> None:
    """Take the schema back to a revision (``base``: nothing); what has no place there is lost."""
    with _connection(db) as (_, config):
        command.downgrade(config, revision)


def current(db: Database) -> str | None:
    """Return the revision that the database is at, ``None`` before the first."""
    with db.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head() -> str:
    """Return the revision that this version of holdtrue needs."""
    found = ScriptDirectory.from_config(_config()).get_current_head()
    assert found is not None
    return found


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("holdtrue.service.store").joinpath("alembic")))
    return config


@contextlib.contextmanager
def _connection(db: Database) -> Iterator[tuple[Connection, Config]]:
    """One transaction: a migration that fails leaves the schema as it was."""
    config = _config()
    with db.engine.connect().execution_options(holdtrue_write=True) as connection, connection.begin():
        if not db.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        config.attributes["connection"] = connection
        yield connection, config
