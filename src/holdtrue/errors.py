"""Every error that holdtrue raises on purpose: one root, and an exit code for the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class HoldtrueError(Exception):
    """Root of all errors; its text names what was wrong, where, and what to do next."""

    exit_code = 1


class RunError(HoldtrueError, RuntimeError):
    """A stage failed while running: a full disk, a corrupt checkpoint, a folder that holds another spec."""


class OutcomeError(RunError):
    """A run came to what cannot go on or pass: training diverged, a bound was not held. Again it ends the same."""


class SpecError(HoldtrueError, ValueError):
    """The command or the spec cannot be understood."""

    exit_code = 2


class NeedError(HoldtrueError, LookupError):
    """A defense needs something that it cannot get; raised before the first step."""

    exit_code = 4


class Problem(NamedTuple):
    """One fault in a data file. ``line`` counts from 1; 0 means the file as a whole."""

    line: int
    field: str
    message: str


class DataError(HoldtrueError, ValueError):
    """A data file has faults; ``problems`` holds the first of them, the text lists those."""

    exit_code = 5

    def __init__(self, path: object, problems: Iterable[Problem], total: int | None = None) -> None:
        self.path = str(path)
        self.problems = tuple(problems)
        self.total = len(self.problems) if total is None else total
        lines = [
            f"  {'line ' + str(p.line) if p.line else 'file'}{', ' + p.field if p.field else ''}: {p.message}"
            for p in self.problems
        ]
        more = self.total - len(self.problems)
        if more > 0:
            lines.append(f"  … and {more} more")
        noun = "problem" if self.total == 1 else "problems"
        super().__init__(f"{self.path}: {self.total} {noun}\n" + "\n".join(lines))


class GateError(HoldtrueError):
    """A gate failed or stayed undecided."""

    exit_code = 3


class ScreenError(GateError):
    """The screen found of the training rows what a limit does not allow; ``exceeded`` has a line for each limit."""

    def __init__(self, exceeded: Sequence[str], advice: str) -> None:
        self.exceeded = tuple(exceeded)
        super().__init__(f"the screen stops this run before training: {'; '.join(exceeded)}. {advice}")


class BudgetError(HoldtrueError):
    """A budget ran out midway; what was done is kept, and the text says what was not."""

    exit_code = 6


class Interrupted(HoldtrueError):  # noqa: N818 (it names what happened; nothing failed)
    """The user stopped the run; what was done is kept and can be resumed."""

    exit_code = 130


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a hint such as `` (did you mean 'kl'?)``, or an empty string when nothing is close."""
    # None of less than a third of the name's length can be near, and comparing with a name of megabytes takes seconds.
    within = [choice for choice in choices if len(name) <= 3 * len(choice)]
    close = difflib.get_close_matches(name, within, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
