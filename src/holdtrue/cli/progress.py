"""Progress on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY = 10.0
TITLES = {
    "screen": "screening the data",
    "prepare": "preparing rows",
    "train": "training",
    "finalise": "finalising the adapter",
    "evaluate": "evaluating",
    "sample": "sampling answers",
    "read": "reading hidden states",
}


class ProgressView:
    """A context manager to hand to a run as its progress callback."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._last = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                redirect_stdout=False,
            )
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, fields: dict[str, Any]) -> None:
        """Show what a stage told."""
        title = _title(fields)
        done, total = fields.get("step", fields.get("done", 0)), fields.get("steps", fields.get("total"))
        if self._bar is not None:
            if title != self._stage or self._task is None:
                self._task = self._bar.add_task(title, total=total, note="")
            self._bar.update(self._task, completed=done, total=total, note=_note(fields))
        elif title != self._stage or time.monotonic() - self._last >= EVERY or (done and done == total):
            count = f" {done}/{total}" if total else (f" {done}" if done else "")
            note = _note(fields)
            print(f"{title}{count}{'  ' + note if note else ''}", file=sys.stderr, flush=True)
            self._last = time.monotonic()
        self._stage = title


def _title(fields: dict[str, Any]) -> str:
    stage = str(fields["stage"])
    title = TITLES.get(stage, stage)
    return f"{fields['run']}: {title}" if "run" in fields else title


def _note(fields: dict[str, Any]) -> str:
    parts = []
    if "what" in fields:
        parts.append(str(fields["what"]))
    if fields.get("loss") is not None:
        parts.append(f"loss {fields['loss']:.3f}")
    if fields.get("tokens_per_second"):
        parts.append(f"{fields['tokens_per_second']:.0f} tokens/s")
    if fields.get("seconds_left") is not None:
        parts.append(f"{duration(fields['seconds_left'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Write a duration for people, such as ``1 h 02 min``, ``3 min 05 s``, ``12 s``."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"
