"""What a worker does with a job, whatever brought it there."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from holdtrue.engines.port import Job, Outcome
from holdtrue.errors import HoldtrueError, Interrupted
from holdtrue.runs import Control, Run, RunSpec, execute

MESSAGE = 2000
"""Letters of an error's text that are kept."""


def work(job: Job, progress: Callable[[dict[str, Any]], None] | None, stop: threading.Event) -> Outcome:
    """Execute a job's run to its end; whatever goes wrong is the outcome, not an error.

    The stages take the base model from ``holdtrue.models.base_model``, once for training and once for measuring: a
    worker that called ``keep_base_model`` loads its weights for the first job only.
    """
    started = time.perf_counter()
    try:
        run = Run.create(job.folder, RunSpec(**job.spec))
        execute(run, Control(progress=progress, stop=stop))
    except Interrupted as error:
        return _ended(job, "interrupted", error, started)
    except HoldtrueError as error:
        return _ended(job, "failed", error, started)
    except Exception as error:  # a library's own, out of memory among them: this job's, and no other's
        return _ended(job, "failed", error, started)
    finally:
        _free_memory()
    return Outcome(job.name, "done", seconds=time.perf_counter() - started)


def _ended(job: Job, status: Any, error: BaseException, started: float) -> Outcome:
    message = str(error)[:MESSAGE] or type(error).__name__
    return Outcome(job.name, status, type(error).__name__, message, time.perf_counter() - started)


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
