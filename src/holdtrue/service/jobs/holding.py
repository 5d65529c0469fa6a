"""A lease that is held: renewed beside the work, which ends when the lease is lost or someone wants it to."""

from __future__ import annotations

import threading
import time

import structlog

from holdtrue.service.jobs.leases import Lease, LeaseLostError

log = structlog.get_logger()


class Held:
    """Renews a lease in a thread of its own, and sets ``stop`` when the work is to end.

    Attributes:
        stop: what the run looks at.
        lost: the lease is gone: nothing may be written any more.
        away: it is, as far as can be known, since the database has not answered for as long as it lasted.
        pausing: the customer wants the job to pause.
    """

    def __init__(self, lease: Lease, service_stop: threading.Event) -> None:
        self.stop, self.lost, self.away, self.pausing = threading.Event(), False, False, False
        self._lease, self._service_stop, self._done = lease, service_stop, threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {lease.job_id}", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _renew(self) -> None:
        renewed, each = time.monotonic(), min(self._lease.seconds / 3, 10.0)
        next_renewal = renewed + each
        while not self._done.wait(min(each, 0.2)):
            if self._service_stop.is_set():
                self.stop.set()
            if time.monotonic() < next_renewal:
                continue
            next_renewal = time.monotonic() + each
            try:
                if self._lease.renew() == "pause":
                    self.pausing = True
                    self.stop.set()
                renewed = time.monotonic()
            except LeaseLostError:
                self.lost = True
            except Exception as error:  # the database is away: hold on as long as the lease lasts
                log.warning("cannot renew", job=self._lease.job_id, error=type(error).__name__)
                self.lost = self.away = time.monotonic() - renewed > self._lease.seconds
            if self.lost:
                self.stop.set()
                return
