"""The service's time. Rows carry the host's; leases, which several hosts compare, carry the database's."""

from __future__ import annotations

import time

from sqlalchemy import text
from sqlalchemy.orm import Session


def now() -> int:
    """Return seconds since 1970, as the API writes times."""
    return int(time.time())


def microseconds() -> int:
    """Return microseconds since 1970, for what has to be told apart within a second."""
    return time.time_ns() // 1000


def shared(session: Session) -> float:
    """Return the time that all who use this database agree on: PostgreSQL's own, or the one host's of SQLite."""
    if session.get_bind().dialect.name == "postgresql":
        return float(session.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0.0)
    return time.time()
