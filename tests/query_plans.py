"""How SQLite reads what a request asks of it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event


def plans(client: Any, path: str) -> list[tuple[str, list[str]]]:
    """Get a path with a client that carries ``db``, and return each SELECT behind it with the steps of its plan."""
    seen: list[tuple[str, object]] = []

    def note(connection, cursor, statement, parameters, context, executemany) -> None:
        seen.append((statement, parameters))

    engine = client.db.engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        answer = client.get(path)
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert answer.status_code == 200
    with engine.connect() as connection:
        return [
            (statement, [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)])
            for statement, parameters in seen
            if statement.startswith("SELECT")
        ]
