"""Keeps the processes of a service running: starts them, starts them again, and stops them in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import structlog

GRACE_SECONDS = 30.0
"""How long a process may take to stop once it was asked to."""
_STEADY_SECONDS = 60.0
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
log = structlog.get_logger("holdtrue.supervisor")


@dataclass
class Child:
    """One process to keep running.

    Attributes:
        name: its role.
        command: what starts it; ``--lifeline FD`` is added.
        handles: file descriptors that it inherits.
    """

    name: str
    command: Sequence[str]
    handles: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    due: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs children until it is told to stop.

    A child that dies is started again, after a delay that doubles with each death and is forgotten once the child has
    lived a minute. Each child holds the end of a pipe, and stops by itself when the supervisor is gone.
    """

    def __init__(self, children: Sequence[Child], environment: Mapping[str, str]) -> None:
        self.children = list(children)
        self._environment = {**os.environ, **environment}
        self._lifeline, self._kept = os.pipe()

    def run(self, stop: threading.Event) -> None:
        """Keep the children running until ``stop`` is set; then stop them, and return."""
        try:
            while not stop.is_set():
                for child in self.children:
                    self._tend(child)
                stop.wait(0.2)
        finally:
            self._stop()
            os.close(self._kept)
            os.close(self._lifeline)

    def _tend(self, child: Child) -> None:
        now = time.monotonic()
        if child.process is None:
            if now >= child.due:
                self._start(child)
            return
        code = child.process.poll()
        if code is None:
            return
        child.deaths = 1 if now - child.started > _STEADY_SECONDS else child.deaths + 1
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(child.deaths - 1, 10))
        child.process, child.due = None, now + delay
        log.error("process_died", role=child.name, code=code, again_in_seconds=delay)

    def _start(self, child: Child) -> None:
        child.process = subprocess.Popen(
            [*child.command, "--lifeline", str(self._lifeline)],
            env=self._environment,
            pass_fds=(self._lifeline, *child.handles),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # stdout is for what people asked for
            start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor, which stops them in order
        )
        child.started = time.monotonic()
        log.info("process_started", role=child.name, pid=child.process.pid)

    def _stop(self) -> None:
        running = [child.process for child in self.children if child.process is not None]
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        for process in running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("process_killed", pid=process.pid)
                process.kill()
                process.wait()


def watch_lifeline(handle: int) -> None:
    """Stop this process, gently and then for good, once its supervisor is gone."""

    def watch() -> None:
        os.read(handle, 1)  # nothing is ever written: it returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def stop_event() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
