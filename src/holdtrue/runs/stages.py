"""Runs the stages of a run in order; a stage that is done is not done again.

A stage's output is on the disk before its marker is, and a marker carries the hash of what the stage started from:
killed at any moment, the next call goes on from the last whole piece of work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from holdtrue.runs import files
from holdtrue.runs.control import Control, rank
from holdtrue.runs.directory import STAGES, Run, Stage
from holdtrue.runs.evaluate import evaluate_stage
from holdtrue.runs.finalise import finalise_stage
from holdtrue.runs.gate import gate_stage
from holdtrue.runs.prepare import prepare_stage
from holdtrue.runs.screen import screen_stage
from holdtrue.runs.train import train_stage

_WORK: dict[Stage, Callable[[Run, Control], dict[str, Any]]] = {
    "screen": screen_stage,
    "prepare": prepare_stage,
    "train": train_stage,
    "finalise": finalise_stage,
    "evaluate": evaluate_stage,
    "gate": gate_stage,
}


def execute(run: Run, control: Control | None = None, *, until: Stage = STAGES[-1]) -> bool:
    """Do what is left of a run, up to and with the stage ``until``; return whether there was anything to do.

    With several processes (torchrun), all train together and the first does the rest.

    Raises:
        Interrupted: a stop was asked for; the run can be resumed.
        RunError: another process works on the run, the disk is full, a checkpoint is corrupt.
        NeedError, DataError, SpecError: before the first step.
    """
    control = control or Control()
    if rank():
        return _help(run, control)
    if run.is_done(until):
        return False
    with run.lock(), files.disk_errors(run.path):
        for stage in run.stages_until(until):
            if run.is_done(stage):
                continue
            control.check(run.path)
            control.tell(stage)
            run.record("stage started", stage=stage)
            inputs = run.inputs(stage)
            started = time.perf_counter()
            try:
                report = _WORK[stage](run, control)
            except BaseException as error:
                _record_failure(run, stage, error)
                raise
            run.mark(stage, inputs=inputs, seconds=time.perf_counter() - started, report=report)
            run.record("stage done", stage=stage)
    return True


def _record_failure(run: Run, stage: Stage, error: BaseException) -> None:
    try:
        run.record("stage stopped", stage=stage, error=type(error).__name__, message=str(error)[:2000])
    except OSError:
        return  # A full disk: the error itself is on its way to the user.


def _help(run: Run, control: Control) -> bool:
    """Train beside the first process: the only stage that takes more than one."""
    while not run.is_done("prepare"):
        control.check(run.path)
        time.sleep(0.2)
    if run.is_done("train"):
        return False
    train_stage(run, control)
    return True
