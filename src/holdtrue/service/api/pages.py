"""Pages of lists: a cursor stands on the order of arrival, so that what arrives meanwhile moves no page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from fastapi import Query
from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import Session

from holdtrue.service.api.errors import ApiError, not_found
from holdtrue.service.store.walk import Within, walk

Row = TypeVar("Row")
Order = Annotated[Literal["asc", "desc"], Query(description="Order of creation.")]
After = Annotated[str | None, Query(max_length=64, description="The id of the last object of the page before.")]
MOST = 1000
Limit = Annotated[int, Query(ge=1, le=MOST, description="Most objects of a page.")]


class Slice(NamedTuple):
    """A page's rows, and whether there are more behind them."""

    rows: Sequence[Any]
    more: bool


def position(session: Session, table: Any, after: str | None, *, owned: Any) -> int | None:
    """Return the ``seq`` that a page begins behind, ``None`` without a cursor.

    Raises:
        ApiError: there is no such cursor.
    """
    if after is None:
        return None
    seq = None if "\0" in after else session.scalar(select(table.seq).where(table.id == after, owned))
    if seq is None:
        raise _lost(after)
    return seq


def take(
    session: Session,
    table: Any,
    *conditions: Any,
    within: Within,
    after: str | None,
    limit: int,
    order: str = "desc",
) -> Slice:
    """Return the rows of a page.

    Args:
        table: has ``id`` and ``seq``.
        conditions: besides ``within``.
        within: columns with their values that an index has before ``seq``. The first one makes a row the caller's: a
            cursor must meet it, and need not be in the list any more.
        after: the id that the last page ended with.
        limit: most rows.
        order: ``desc``, the newest first, or ``asc``.

    Raises:
        ApiError: there is no such cursor.
    """
    column, value = within[0]
    seq = position(session, table, after, owned=column == value)
    query = select(table).where(*conditions)
    return _slice(session, walk(session, query, within, table.seq, behind=seq, down=order == "desc"), limit)


def take_by_time(
    session: Session, table: Any, query: Select[Any], *, owned: Any, after: str | None, limit: int, order: str = "desc"
) -> Slice:
    """As :func:`take` for a table without ``seq``: its order is by ``created_at``, and by ``id`` within a second."""
    place = tuple_(table.created_at, table.id)
    if after is not None:
        last = None
        if "\0" not in after:
            last = session.execute(select(table.created_at, table.id).where(table.id == after, owned)).first()
        if last is None:
            raise _lost(after)
        query = query.where(place < tuple(last) if order == "desc" else place > tuple(last))
    columns = (table.created_at, table.id)
    return _slice(session, query.order_by(*(each.desc() if order == "desc" else each for each in columns)), limit)


def _slice(session: Session, ordered: Select[Any], limit: int) -> Slice:
    rows = session.scalars(ordered.limit(limit + 1)).all()
    return Slice(rows[:limit], len(rows) > limit)


def _lost(after: str) -> ApiError:
    return not_found("object to go on after:", after, param="after")
