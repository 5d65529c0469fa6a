"""Opens the database of a service, and hands out transactions."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from typing import Any, Literal

from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from holdtrue.errors import SpecError
from holdtrue.runs.files import causes

BUSY_SECONDS = 30.0
"""How long a writer of SQLite waits for the one before it."""
CONNECTIONS = 40
"""As many as an API process has threads, which anyio limits to so many: a request has one at a time, and none waits."""
_KEPT = 10
_AWAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
}
_AWAY_CLASSES = {"08", "40", "53", "55", "57", "58"}
"""Of PostgreSQL's states: connection, rollback, resources, locks, an operator's doing, the system below."""


class Database:
    """An engine with its sessions. Use ``write`` for what changes something and ``read`` for the rest."""

    def __init__(self, url: str, **options: Any) -> None:
        """Open the database; ``SpecError`` for anything but SQLite and PostgreSQL."""
        self.url = _with_driver(url)
        pool = {"pool_size": _KEPT, "max_overflow": CONNECTIONS - _KEPT}
        if self.url.get_backend_name() == "sqlite":
            options = {"connect_args": {"timeout": BUSY_SECONDS, "check_same_thread": False}, **pool, **options}
        else:
            options = {"pool_pre_ping": True, **pool, **options}
        self.engine: Engine = create_engine(self.url, json_serializer=_to_json, **options)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite, which has one writer at a time."""
        return self.url.get_backend_name() == "sqlite"

    @contextlib.contextmanager
    def write(self, wait: float = BUSY_SECONDS) -> Iterator[Session]:
        """A transaction that changes something; on SQLite it takes the write lock at its start, and cannot deadlock.

        Args:
            wait: seconds to wait for other writers where that is less than usual; then SQLAlchemy's
                ``OperationalError``.
        """
        with self._sessions() as session:
            session.connection(execution_options={"holdtrue_write": True, "holdtrue_wait": wait})
            if wait < BUSY_SECONDS and not self.is_sqlite:
                session.execute(text(f"SET LOCAL lock_timeout = {round(wait * 1000)}"))
            yield session
            session.commit()

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads; nothing it changes is kept, and what it has read can be looked at afterwards."""
        with self._sessions() as session:
            yield session
            session.expunge_all()  # or the rollback would empty the rows
            session.rollback()

    def empty_log(self) -> None:
        """Empty SQLite's write-ahead log, which still holds what was deleted; a reader at work puts that off.

        PostgreSQL sees to its own log.
        """
        if not self.is_sqlite:
            return
        with contextlib.closing(self.engine.raw_connection()) as connection:
            cursor = connection.cursor()
            try:
                cursor.execute("PRAGMA busy_timeout = 1000")  # it keeps writers waiting
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                cursor.execute(f"PRAGMA busy_timeout = {round(BUSY_SECONDS * 1000)}")
                cursor.close()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def trouble(error: BaseException) -> Literal["full", "away"] | None:
    """Say whether an error, or what caused it, is a database without room, or one that is away or locked: both pass.

    A statement that a database refuses for what it says is neither.
    """
    for seen in causes(error):
        if isinstance(seen, PoolTimeoutError):
            return "away"
        if isinstance(seen, OperationalError) and (found := _trouble(seen.orig)) is not None:
            return found
    return None


def _trouble(error: BaseException | None) -> Literal["full", "away"] | None:
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        full, away = code == sqlite3.SQLITE_FULL, code in _AWAY
    else:
        state = getattr(error, "sqlstate", None)  # a server that does not answer gives none
        full, away = state == "53100", state is None or state[:2] in _AWAY_CLASSES
    return "full" if full else "away" if away else None


def _to_json(value: Any) -> str:
    """Write a column's JSON; a figure that is no number becomes ``null``, since PostgreSQL refuses the row with it."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))


def _with_driver(url: str) -> URL:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql" and parsed.drivername == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise SpecError(f"the database is SQLite or PostgreSQL, and the URL says {parsed.get_backend_name()!r}")
    return parsed


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, in SQLAlchemy's time and not the driver's
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    options = connection.get_execution_options()
    if not options.get("holdtrue_write", False):
        connection.exec_driver_sql("BEGIN")
        return
    wait, raw = options.get("holdtrue_wait", BUSY_SECONDS), connection.connection.driver_connection
    if wait < BUSY_SECONDS:
        raw.execute(f"PRAGMA busy_timeout = {round(wait * 1000)}")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        if wait < BUSY_SECONDS:
            raw.execute(f"PRAGMA busy_timeout = {round(BUSY_SECONDS * 1000)}")
