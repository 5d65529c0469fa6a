"""What a stage is given besides the run: where to tell its progress, and whether to stop."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from holdtrue.errors import Interrupted

Progress = Callable[[dict[str, Any]], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Control:
    """Progress and interruption of a run.

    Attributes:
        progress: called with ``stage`` and what that stage tells (training: ``step``, ``steps``, ``loss``,
            ``tokens_per_second``, ``seconds_left``, and ``eval_loss`` in place of ``loss`` where the validation rows
            were measured; others: ``done`` and, where known, ``total``).
        stop: set by whoever wants the run to save and stop.
    """

    progress: Progress | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def tell(self, stage: str, **fields: Any) -> None:
        """Pass progress on, if anybody listens."""
        if self.progress is not None:
            self.progress({"stage": stage, **fields})

    def check(self, folder: Path) -> None:
        """Raise ``Interrupted`` when a stop was asked for."""
        if self.stop.is_set():
            raise interrupted(folder)

    def watch(self, items: Iterable[Item], folder: Path, stage: str, total: int | None = None) -> Iterator[Item]:
        """Yield the items, telling progress and stopping between them when asked to."""
        for done, item in enumerate(items):
            self.check(folder)
            if done % 256 == 0:
                self.tell(stage, done=done, total=total)
            yield item


def interrupted(folder: Path) -> Interrupted:
    """Return the error that says how to go on."""
    return Interrupted(f"interrupted; what was done is saved. To go on: holdtrue resume {folder}")


def rank() -> int:
    """Return this process's number among those that torchrun or accelerate started; 0 when alone."""
    return int(os.environ.get("RANK", "0"))
