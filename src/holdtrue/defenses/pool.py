"""Rows drawn from a pool: what defenses share that add other rows to the task's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdtrue.data import ChatRow, ChatSummary, read_chat, resolve_data, validate_chat
from holdtrue.errors import NeedError


def check_pool(pool: str, folder: Path, what: str) -> ChatSummary:
    """Return what the pool holds; ``NeedError`` where there is none, ``DataError`` where it is no chat file.

    ``what`` names, for the message, who needs rows and which.
    """
    path = resolve_data(pool, folder)
    if not path.is_file():
        raise NeedError(f"{what} and {path} does not exist: give a chat file, or builtin:pool")
    return validate_chat(path)


def wanted_rows(fraction: float, task_rows: int) -> int:
    """Return how many rows a fraction of the task's is: none for 0, at least one otherwise."""
    return max(round(fraction * task_rows), 1) if fraction > 0 else 0


def drawn_rows(
    pool: str, wanted: int, folder: Path, *, draw: str, kind: str, ce: bool, notes: dict[str, Any]
) -> Iterator[ChatRow]:
    """Yield ``wanted`` rows in the pool's order, drawn by the text ``draw``; where there are too few, all repeat."""
    path = resolve_data(pool, folder)
    size = validate_chat(path).rows
    times, rest = divmod(wanted, size)
    once_more = set(random.Random(draw).sample(range(size), rest))
    notes.update(pool=pool, pool_rows=size, rows=wanted, repeated_rows=max(0, wanted - size))
    for index, row in enumerate(read_chat(path, kind=kind)):
        yield from [replace(row, ce=ce)] * (times + (index in once_more))
