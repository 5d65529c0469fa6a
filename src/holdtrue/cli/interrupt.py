"""Ctrl-C: the first asks the run to save and stop, the second ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first interrupt (or SIGTERM) sets."""
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        # os.write, because print may be in the middle of a line when the signal comes.
        if stop.is_set():
            os.write(2, b"\nstopped at once; the last checkpoint is kept\n")
            os._exit(130)
        stop.set()
        os.write(2, b"\nstopping: saving what was done (again to stop at once)\n")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
