"""Processes of this machine: each takes one job after another, and a dead one is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from holdtrue.engines.port import Job, Outcome, Told
from holdtrue.errors import SpecError

PATIENCE = 0.2
"""Seconds between looks at ``stop``."""


class LocalEngine:
    """``workers`` processes beside each other. With several, each gets its part of the processor's threads.

    Raises:
        SpecError: fewer than one worker.
    """

    def __init__(self, workers: int = 1) -> None:
        if workers < 1:
            raise SpecError(f"--workers {workers}: give at least 1")
        self.workers = workers

    def run(self, jobs: Sequence[Job], told: Told, stop: threading.Event) -> Iterator[Outcome]:
        """See :class:`~holdtrue.engines.port.Engine`. Leaving the iterator early ends the processes at once."""
        left = deque(jobs)
        busy: dict[Connection, _Worker] = {}
        asked_to_stop = False
        try:
            while busy or (left and not stop.is_set()):
                while left and len(busy) < self.workers and not stop.is_set():
                    worker = _start(left.popleft(), min(self.workers, len(jobs)))
                    busy[worker.pipe] = worker
                if stop.is_set() and not asked_to_stop:
                    asked_to_stop = True
                    for worker in busy.values():
                        _send(worker, None)
                for pipe in wait(list(busy), PATIENCE):
                    assert isinstance(pipe, Connection)
                    worker = busy.pop(pipe)
                    kind, value = _receive(worker, stop)
                    if kind == "progress":
                        told(worker.job.name, value)
                        busy[pipe] = worker
                        continue
                    yield value
                    if kind == "ended" and left and not stop.is_set():
                        worker = worker._replace(job=left.popleft(), started=time.perf_counter())
                        _send(worker, worker.job)
                        busy[pipe] = worker
                    else:
                        _end(worker)
        finally:
            for worker in busy.values():
                worker.process.kill()
                _end(worker)


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection
    job: Job
    started: float


def _start(job: Job, beside: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, beside), daemon=True)
    process.start()
    theirs.close()  # so that the process's death ends the pipe
    worker = _Worker(process, ours, job, time.perf_counter())
    _send(worker, job)
    return worker


def _send(worker: _Worker, job: Job | None) -> None:
    with contextlib.suppress(OSError):  # a dead process is found out when it is listened to
        worker.pipe.send(job)


def _receive(worker: _Worker, stop: threading.Event) -> tuple[str, Any]:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(10)
        seconds = time.perf_counter() - worker.started
        if stop.is_set():
            return "died", Outcome(worker.job.name, "interrupted", "Interrupted", "stopped at once", seconds)
        return "died", Outcome(worker.job.name, "failed", "WorkerDied", _death(worker.process.exitcode), seconds)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}. What was done is kept: run the grid again to go on"
    return f"its process ended with code {code}. What was done is kept: run the grid again to go on"


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.join(10)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _serve(pipe: Connection, beside: int) -> None:
    """Take jobs until the pipe ends; ``None`` asks the one in hand to stop."""
    # Ctrl-C reaches the whole group of processes: here only the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()
    inbox: deque[Job] = deque()
    there = threading.Semaphore(0)

    def listen() -> None:
        while True:
            try:
                job = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone, or done with us; checkpoints are whole at any moment
            if job is None:
                stop.set()
            else:
                inbox.append(job)
                there.release()

    threading.Thread(target=listen, daemon=True).start()
    _share_processor(beside)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from holdtrue.engines.worker import work
    from holdtrue.models import keep_base_model

    keep_base_model()
    writing = threading.Lock()

    def tell(kind: str, value: Any) -> None:
        with writing, contextlib.suppress(OSError):
            pipe.send((kind, value))

    while True:
        there.acquire()
        tell("ended", work(inbox.popleft(), lambda fields: tell("progress", fields), stop))


def _share_processor(beside: int) -> None:
    if beside > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, _cores() // beside))


def _cores() -> int:
    """Return how many cores this process may use: those of the machine, or of its container or affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
