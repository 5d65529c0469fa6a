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
        RunError: the database was made by a later version of holdtrue, or rows contradict each other afterwards; then
            nothing has changed.
    """
    with _connection(db) as (connection, config):
        _check_known(connection, config)
        command.upgrade(config, revision)


def downgrade(db: Database, revision: str) -> None:
    """Take the schema back to a revision (``base``: nothing); what has no place there is lost.

    Raises:
        RunError: as :func:`upgrade`.
    """
    with _connection(db) as (connection, config):
        _check_known(connection, config)
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


def check(db: Database) -> None:
    """Refuse a database whose schema is not the one that this version of holdtrue works with (``RunError``)."""
    found = current(db)
    if found != head():
        at = "has no tables of holdtrue yet" if found is None else f"is at revision {found}, not {head()}"
        raise RunError(f"the database {at}; `holdtrue serve` of this version brings an earlier one up to it")


def _check_known(connection: Connection, config: Config) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    now = MigrationContext.configure(connection).get_current_revision()
    if now is not None and now not in known:
        raise RunError(f"the database is at revision {now}, which this version of holdtrue does not know: update it")


def _config() -> Config:
    config = Config()
    place = str(files("holdtrue.service.store").joinpath("alembic"))
    config.set_main_option("script_location", place.replace("%", "%%"))
    return config


@contextlib.contextmanager
def _connection(db: Database) -> Iterator[tuple[Connection, Config]]:
    """One transaction: a migration that fails leaves the schema as it was."""
    config = _config()
    with (
        db.engine.connect().execution_options(holdtrue_write=True) as connection,
        _links_unchecked(connection),
        connection.begin(),
    ):
        if not db.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        config.attributes["connection"] = connection
        yield connection, config
        if db.is_sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
            raise RunError(
                f"a row of {broken[0]} would name a row of {broken[2]} that is not there; nothing has changed"
            )


@contextlib.contextmanager
def _links_unchecked(connection: Connection) -> Iterator[None]:
    """Let SQLite make a table anew, which is how it changes one, while others refer to it.

    Its check of foreign keys would count the old table's end as the end of its rows, and can be put off only outside of
    a transaction.
    """
    if connection.dialect.name != "sqlite":
        yield
        return
    raw = connection.connection.driver_connection
    assert raw is not None
    raw.execute("PRAGMA foreign_keys = OFF")
    try:
        yield
    finally:
        raw.execute("PRAGMA foreign_keys = ON")
