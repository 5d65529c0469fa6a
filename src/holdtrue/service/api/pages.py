"""Pages of lists: a cursor stands on the order of arrival, so that what arrives meanwhile moves no page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from fastapi import Query
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from holdtrue.service.api.errors import not_found

Row = TypeVar("Row")
Order = Annotated[Literal["asc", "desc"], Query(description="Order of creation.")]
After = Annotated[str | None, Query(max_length=64, description="The id of the last object of the page before.")]


class Slice(NamedTuple):
    """A page's rows, and whether there are more behind them."""

    rows: Sequence[Any]
    more: bool


def take(
    session: Session, table: Any, query: Select[Any], *, owned: Any, after: str | None, limit: int, order: str = "desc"
) -> Slice:
    """Return the rows of a page.

    Args:
        table: has ``id`` and ``seq``.
        query: selects the rows of the list, without an order.
        owned: the condition that makes a row the caller's; a cursor must meet it, and need not be in the list any more.
        after: the id that the last page ended with.
        limit: most rows.
        order: ``desc``, the newest first, or ``asc``.

    Raises:
        ApiError: there is no such cursor.
    """
    if after is not None:
        seq = None if "\0" in after else session.scalar(select(table.seq).where(table.id == after, owned))
        if seq is None:
            raise not_found("object to go on after:", after, param="after")
        query = query.where(table.seq < seq if order == "desc" else table.seq > seq)
    ordered = query.order_by(table.seq.desc() if order == "desc" else table.seq.asc())
    rows = session.scalars(ordered.limit(limit + 1)).all()
    return Slice(rows[:limit], len(rows) > limit)
