"""Walks an index in the order of a page, on both databases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

Within = Sequence[tuple[Any, Any]]
"""Columns that an index begins with, each with the value that is wanted."""


def walk(
    session: Session, query: Select[Any], within: Within, seq: Any, *, behind: int | None = None, down: bool = True
) -> Select[Any]:
    """Narrow a query to some values and order it by ``seq``, so that the index on both is what is walked.

    With equal signs PostgreSQL may as well take the primary key's index for an order by ``seq``, and walk past
    whatever lies between two rows of a project; how much that is, its statistics cannot say. Bounds and an order over
    all columns of the index mean the same, and there is no other index to go by.

    Args:
        session: which database it is.
        query: without an order.
        within: the columns of the index before ``seq``.
        seq: the last column of the index.
        behind: the value of ``seq`` to begin behind.
        down: from the highest ``seq`` to the lowest.
    """
    if session.get_bind().dialect.name != "postgresql":
        query = query.where(*(column == value for column, value in within))
        if behind is not None:
            query = query.where(seq < behind if down else seq > behind)
        return query.order_by(seq.desc() if down else seq)
    columns, values = zip(*within, strict=True)
    start, whole = tuple_(*columns), tuple_(*columns, seq)
    place = (*values, behind)
    # One bound at each end: of two at the end where it begins, the database may take the farther.
    if down:
        query = query.where(start >= values, start <= values if behind is None else whole < place)
        return query.order_by(*(column.desc() for column in columns), seq.desc())
    query = query.where(start <= values, start >= values if behind is None else whole > place)
    return query.order_by(*columns, seq)
