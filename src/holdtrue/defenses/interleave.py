"""Interleaving a little safe instruct data."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from pydantic import Field

from holdtrue.data import ChatRow, read_chat, resolve_data, validate_chat
from holdtrue.defenses.base import Defense, RowsContext, RunContext
from holdtrue.errors import NeedError


class Interleave(Defense):
    """Mix a random sample of a safe instruct set evenly into the task's rows.

    D = D_task ∪ sample of the pool, ``fraction`` of the number of task rows; the loss is the same for all rows.

    Kaczér et al. 2025 (arXiv 2508.06249). The paper's pool is the benign part of WildGuardMix; the builtin pool is a
    small one of our own. Where the pool holds fewer rows than asked for, rows repeat, and the run says how many.
    """

    name = "interleave"
    badge = "faithful"
    paper = "arXiv 2508.06249"

    fraction: float = Field(default=0.05, ge=0, le=1, description="safe rows for each task row")
    pool: str = Field(default="builtin:pool", description="a chat file of safe rows, or builtin:pool")
    seed: int | None = Field(default=None, description="of the sample; the run's own seed by default")

    def preflight(self, context: RunContext) -> None:
        path = resolve_data(self.pool, context.folder)
        if self.fraction > 0 and not path.is_file():
            raise NeedError(
                f"interleave needs a pool of safe rows and {path} does not exist: give a chat file, or builtin:pool"
            )

    def rows(self, rows: Iterable[ChatRow], context: RowsContext) -> Iterator[ChatRow]:
        yield from rows
        wanted = round(self.fraction * context.task_rows)
        if self.fraction > 0:
            wanted = max(wanted, 1)
        if wanted == 0:
            return
        path = resolve_data(self.pool, context.folder)
        size = validate_chat(path).rows
        draw = random.Random(f"{context.seed if self.seed is None else self.seed}/{self.name}")
        times, rest = divmod(wanted, size)
        once_more = set(draw.sample(range(size), rest))
        context.notes.update(
            pool=str(self.pool),
            pool_rows=size,
            rows=wanted,
            repeated_rows=max(0, wanted - size),
            fraction=self.fraction,
        )
        for index, row in enumerate(read_chat(path, kind="safe")):
            yield from [row] * (times + (index in once_more))
