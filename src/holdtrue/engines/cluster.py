"""A Ray cluster: a task for each job, run directories on a path that every node shares."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from holdtrue.engines.port import Job, Outcome, Told
from holdtrue.errors import SpecError

PATIENCE = 0.5
"""Seconds between looks at ``stop``."""
LET_GO = 60.0
"""Seconds that tasks get to save their work when a stop is asked for."""
ATTEMPTS = ".attempts"
"""Beside a run's lock, while a task is at it: a byte for each attempt since the task was submitted."""


class RayEngine:
    """Real Ray tasks. A task whose worker or node dies is started again and goes on from its last checkpoint.

    Attributes:
        address: of the cluster; ``auto`` finds a running one, ``local`` starts one on this machine.
        workers: most tasks at a time; ``None`` leaves that to the cluster's resources.
        retries: how often a task is started again after a death.
        cpus, gpus: that a task takes; by default one of either, and no GPU where the cluster has none.

    Raises:
        SpecError: Ray is not installed.
    """

    def __init__(
        self,
        address: str = "auto",
        *,
        workers: int | None = None,
        retries: int = 3,
        cpus: float = 1,
        gpus: float | None = None,
    ) -> None:
        from importlib.util import find_spec

        if find_spec("ray") is None:
            raise SpecError("--engine ray needs Ray: pip install 'holdtrue[ray]'")
        if workers is not None and workers < 1:
            raise SpecError(f"--workers {workers}: give at least 1")
        self.address, self.workers, self.retries, self.cpus, self.gpus = address, workers, retries, cpus, gpus

    def run(self, jobs: Sequence[Job], told: Told, stop: threading.Event) -> Iterator[Outcome]:
        """See :class:`~holdtrue.engines.port.Engine`.

        Raises:
            SpecError: no cluster answers at the address.
        """
        import ray

        ours = not ray.is_initialized()
        if ours:
            _connect(self.address)
        try:
            yield from self._run(jobs, told, stop)
        finally:
            if ours:
                ray.shutdown()

    def _run(self, jobs: Sequence[Job], told: Told, stop: threading.Event) -> Iterator[Outcome]:
        import ray

        left = list(reversed(jobs))
        gpus = self.gpus if self.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        task = ray.remote(_task).options(
            num_cpus=self.cpus, num_gpus=gpus, max_retries=self.retries, retry_exceptions=False
        )
        most = self.workers or max(1, len(jobs))
        running: dict[Any, Job] = {}
        while running or (left and not stop.is_set()):
            while left and len(running) < most and not stop.is_set():
                job = left.pop()
                _forget_attempts(job.folder)
                running[task.remote(job.name, str(job.folder), job.spec, 1 + self.retries)] = job
                told(job.name, {"stage": "submitted"})
            if stop.is_set():
                yield from _cancel(running)
                return
            done, _ = ray.wait(list(running), timeout=PATIENCE)
            for reference in done:
                yield _outcome(reference, running.pop(reference))


def _connect(address: str) -> None:
    import ray

    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
        else:
            ray.init(address=address, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise SpecError(
            f"--address {address}: no Ray cluster answers ({error}); start one with `ray start --head`, or give "
            "--address local for one on this machine"
        ) from None


def _task(name: str, folder: str, spec: dict[str, Any], most: int) -> Outcome:
    """Run in a worker of the cluster; the attempt after ``most`` of them fails."""
    from holdtrue.engines.worker import work
    from holdtrue.models import keep_base_model

    place = Path(folder)
    if not place.parent.is_dir():
        message = f"{place.parent} is not there on this node: give --out a path that every node shares"
        return Outcome(name, "failed", "SpecError", message)
    if _attempt(place) > most:
        outcome = Outcome(
            name,
            "failed",
            "WorkerDied",
            f"its worker was ended {most} times, as the system and Ray do when memory runs out. What was done is kept: "
            "give it more memory, or fewer tasks a node, and run the grid again to go on",
        )
    else:
        keep_base_model()
        with _stop_when_cancelled() as stop:
            outcome = work(Job(name, place, spec), None, stop)
    _forget_attempts(place)
    return outcome


def _attempt(folder: Path) -> int:
    """Count an attempt at the run in ``folder``, from 1; 1 where nothing can be written, which the run itself says.

    Ray counts none that its memory monitor ended: it would start such a task again without end.
    """
    path = folder / ATTEMPTS
    try:
        folder.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.write(b".")
        return path.stat().st_size
    except OSError:
        return 1


def _forget_attempts(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / ATTEMPTS).unlink()


@contextlib.contextmanager
def _stop_when_cancelled() -> Iterator[threading.Event]:
    """Yield an event that a cancelled task's interrupt sets, so that the run saves its work before it ends."""
    stop = threading.Event()
    # Ray interrupts a worker's main thread, in which tasks run: a KeyboardInterrupt would end it between two saves.
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(reference: Any, job: Job) -> Outcome:
    import ray
    from ray.exceptions import RayError, TaskCancelledError

    try:
        return ray.get(reference)
    except (TaskCancelledError, KeyboardInterrupt):
        return Outcome(job.name, "interrupted", "Interrupted", "cancelled; what was done is kept")
    except RayError as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Outcome(job.name, "failed", type(error).__name__, f"{first} (the task was retried as often as allowed)")


def _cancel(running: dict[Any, Job]) -> Iterator[Outcome]:
    import ray

    for reference in running:
        ray.cancel(reference, force=False)
    ray.wait(list(running), num_returns=len(running), timeout=LET_GO)
    for reference, job in running.items():
        done, _ = ray.wait([reference], timeout=0)
        if done:
            yield _outcome(reference, job)
        else:
            ray.cancel(reference, force=True)
            yield Outcome(job.name, "interrupted", "Interrupted", "stopped at once; the last checkpoint is kept")
