"""Sends a job's metrics to Weights & Biases, with the provider's key, and nothing else of the job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger()
SECONDS = 30.0
"""How long W&B may take to begin, and to take what is left at the end."""


class TrackingError(Exception):
    """Metrics cannot be sent; the message is for the customer."""


class Tracker:
    """One run at W&B for each training of a job; one that goes on after a worker's death goes on there too.

    Whatever happens to it, the job goes on: what fails is logged, and sending ends.

    Args:
        wanted: ``project``, and ``entity``, ``name`` and ``tags`` or ``None``: a job's integration.
        run_id: names the run at W&B: the job's id, a dash, and the attempt. A run without a name shows the job's.
        folder: for W&B's own files.

    Raises:
        TrackingError: it is not installed or not set up here, or does not answer.
    """

    def __init__(self, wanted: Mapping[str, Any], run_id: str, folder: Path) -> None:
        offline = os.environ.get("WANDB_MODE") == "offline"
        if find_spec("wandb") is None or not (offline or os.environ.get("WANDB_API_KEY")):
            raise TrackingError("W&B is not set up on this service: no metrics are sent there")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, disable_job_creation=True, silent=True,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
            init_timeout=SECONDS, login_timeout=SECONDS, finish_timeout=SECONDS,
        )  # fmt: skip
        try:
            self._run = wandb.init(
                project=wanted["project"],
                entity=wanted.get("entity"),
                name=wanted.get("name") or run_id.rpartition("-")[0],
                tags=wanted.get("tags"),
                id=run_id,
                resume="allow",
                reinit="create_new",
                dir=str(folder),
                settings=settings,
            )
        except Exception as error:
            log.warning("wandb failed", run=run_id, error=type(error).__name__)
            raise TrackingError("W&B did not take the run: no metrics are sent there") from error

    def send(self, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step, ``step`` among them. What W&B has of it already stays as it is."""
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in metrics.items() if value is not None}, step=metrics["step"])
        except Exception as error:
            log.warning("wandb failed", run=self._run.id, error=type(error).__name__)
            self._run = None

    def close(self) -> None:
        """Wait for what is under way, half a minute at most."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                log.warning("wandb failed", run=self._run.id, error=type(error).__name__)
            self._run = None
