"""The port: jobs go in, each comes out once as done, failed or interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Status = Literal["done", "failed", "interrupted"]
Told = Callable[[str, dict[str, Any]], None]
"""Called with a job's name and what its run tells of its progress (see ``holdtrue.runs.Control``)."""


class Job(NamedTuple):
    """A run to be made or gone on with.

    Attributes:
        name: unique among the jobs.
        folder: the run's directory, on a path that every worker sees.
        spec: the run spec, as ``RunSpec.canonical()``.
    """

    name: str
    folder: Path
    spec: dict[str, Any]


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        name: the job's.
        status: ``interrupted`` is a run that stopped when asked to, and can be resumed.
        error: the type of what went wrong; ``message`` its text.
        seconds: that the job took, this time.
    """

    name: str
    status: Status
    error: str | None = None
    message: str | None = None
    seconds: float = 0.0


class Engine(Protocol):
    """Executes jobs."""

    def run(self, jobs: Sequence[Job], told: Told, stop: threading.Event) -> Iterator[Outcome]:
        """Yield an outcome for each job that was begun, in the order in which they end; every job at most once.

        Once ``stop`` is set no job is begun, and those in hand save their work and end as ``interrupted``. A job's
        failure, the death of its process included, is its own: the others go on.

        Raises:
            SpecError: the engine cannot be had here.
        """
        ...
