"""Passes over sampled rows, a number a row: a batch at a time, each batch on disk before the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from holdtrue.errors import Interrupted, RunError
from holdtrue.screening.sample import sampled_rows
from holdtrue.selection import ScoreFile

if TYPE_CHECKING:
    from holdtrue.data import ChatRow, ChatSummary

FORMAT = 1
"""Of what is kept: whoever changes how rows are drawn, cut, answered or read counts it up."""
BATCH = 16
"""Rows in memory at once."""
AGAIN = "interrupted; what was measured is kept. To go on, give the same command again"


class PassKey(NamedTuple):
    """All that a pass depends on.

    Attributes:
        pool: SHA-256 of the rows' file.
        sample: rows and seed of the draw.
        model: the model's revision.
        what: which pass.
        settings: what else decides it: tokens, a vector's or an adapter's hash.
        dtype: numbers that the model runs in.
        format: ``FORMAT``.
    """

    pool: str
    sample: tuple[int, int]
    model: str
    what: str
    settings: tuple[str | int, ...]
    dtype: str
    format: int = FORMAT

    def header(self) -> str:
        """Return the first line of the file of scores."""
        import json

        return json.dumps(["screen", *self], sort_keys=True)


@dataclass(frozen=True)
class Watch:
    """Who is told of the progress, and who may stop it.

    Attributes:
        progress: called with ``what``, ``done`` and ``total``.
        stop: set by whoever wants the work to stop.
    """

    progress: Callable[[dict[str, Any]], None] | None = None
    stop: Event = field(default_factory=Event)

    def tell(self, what: str, done: int, total: int, **more: Any) -> None:
        """Pass progress on; raise ``Interrupted`` when a stop was asked for."""
        if self.stop.is_set():
            raise Interrupted(AGAIN)
        if self.progress is not None:
            self.progress({"what": what, "done": done, "total": total, **more})


def run_pass(
    key: PassKey,
    summary: ChatSummary,
    chosen: Sequence[int],
    score: Callable[[Sequence[ChatRow]], Sequence[float]],
    *,
    watch: Watch,
    cache: str | os.PathLike[str] | None,
) -> np.ndarray:
    """Return a number for each chosen row, in the file's order, (n,) float64; nan where there is none.

    Batches that an earlier, interrupted call has written are not made again.

    Args:
        key: names the file that keeps the numbers. No text of a row is in it.
        summary: the rows' file, as it was validated.
        chosen: the rows.
        score: from at most ``BATCH`` rows to their numbers.
        watch: told after each batch.
        cache: the cache folder; by default the user's.

    Raises:
        Interrupted: finished batches are kept.
        RunError: the file changed meanwhile, or the cache cannot be written.
    """
    total = len(chosen)
    with ScoreFile.open(key, cache) as file:
        if len(file.scores) < total:
            rows = islice(sampled_rows(summary, chosen), len(file.scores), None)
            watch.tell(key.what, len(file.scores), total)
            while len(file.scores) < total:
                batch = list(islice(rows, min(BATCH, total - len(file.scores))))
                if not batch:
                    raise RunError(f"{summary.path} changed while it was screened: start again")
                file.append(score(batch))
                watch.tell(key.what, len(file.scores), total)
        return np.array(file.scores[:total], dtype=np.float64)
