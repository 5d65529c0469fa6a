"""How a database reads what it is asked, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event


def asked(db: Any, act: Callable[[], object]) -> list[tuple[str, Any]]:
    """Do something, and return the statements that it sent with their parameters."""
    seen: list[tuple[str, Any]] = []

    def note(connection, cursor, statement, parameters, context, executemany) -> None:
        seen.append((statement, parameters))

    event.listen(db.engine, "before_cursor_execute", note)
    try:
        act()
    finally:
        event.remove(db.engine, "before_cursor_execute", note)
    return seen


def plans_of(db: Any, act: Callable[[], object], kinds: tuple[str, ...] = ("SELECT",)) -> list[tuple[str, list[str]]]:
    """Do something, and return each statement of some kinds behind it with the steps of SQLite's plan."""
    seen = [each for each in asked(db, act) if each[0].startswith(kinds)]
    with db.engine.connect() as connection:
        return [
            (statement, [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)])
            for statement, parameters in seen
        ]


def plans(client: Any, path: str) -> list[tuple[str, list[str]]]:
    """Get a path with a client that carries ``db``, and return each SELECT behind it with the steps of its plan."""

    def get() -> None:
        assert client.get(path).status_code == 200

    return plans_of(client.db, get)


def work(db: Any, act: Callable[[], object]) -> int:
    """Do something, and return how much the database works for its SELECTs, whatever its plan looks like.

    It counts the rows that PostgreSQL looks at, or SQLite's machine instructions, of which a row takes ten or so.
    """
    seen = [each for each in asked(db, act) if each[0].startswith("SELECT")]
    return (_instructions if db.is_sqlite else _rows)(db, seen)


def _instructions(db: Any, seen: list[tuple[str, Any]]) -> int:
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    with db.engine.connect() as connection:
        raw = connection.connection.driver_connection
        raw.set_progress_handler(tick, 100)
        try:
            for statement, parameters in seen:
                raw.execute(statement, parameters).fetchall()
        finally:
            raw.set_progress_handler(None, 0)
    return count * 100


def _rows(db: Any, seen: list[tuple[str, Any]]) -> int:
    with db.engine.connect() as connection:
        return sum(
            _looked_at(
                connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar()[0][
                    "Plan"
                ]
            )
            for statement, parameters in seen
        )


def _looked_at(node: dict[str, Any]) -> float:
    below = sum(_looked_at(each) for each in node.get("Plans", ()))
    if "Scan" not in node["Node Type"]:
        return below
    rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return below + max(1, rows) * node["Actual Loops"]
