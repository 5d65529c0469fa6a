"""A grid's folder: its cells, its index, and the work of filling it."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from holdtrue.bench.cells import ADDRESS, Cell
from holdtrue.bench.reuse import Trained
from holdtrue.bench.spec import GridSpec
from holdtrue.engines import Engine, Job, Outcome
from holdtrue.errors import HoldtrueError, Interrupted, RunError, SpecError
from holdtrue.runs import STAGES, Run, files, is_run

INDEX = "grid.json"
CELLS = "cells"
Progress = Callable[[dict[str, Any]], None]


@dataclass
class State:
    """How a cell stands: ``pending``, ``done``, ``failed`` or ``interrupted``, with the last error's type and text."""

    cell: Cell
    folder: Path
    status: str = "pending"
    error: dict[str, str | None] | None = None
    seconds: float | None = None
    before: bool = False
    """Whether it was done before this call."""

    def to_json(self, out: Path) -> dict[str, Any]:
        """Return the cell's entry in the index."""
        cell = self.cell
        return {
            "name": cell.title,
            "folder": str(self.folder.relative_to(out)),
            "key": cell.key,
            "model": cell.model,
            "data": cell.data,
            "setting": cell.variant.name,
            "family": cell.variant.family,
            "strengths": cell.variant.strengths,
            "seed": cell.seed,
            "status": self.status,
            "error": self.error,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Bench:
    """A grid in its folder.

    Attributes:
        out: the folder: ``cells/`` with a run directory for each cell, ``grid.json``, and what ``write_results`` adds.
        grid: the spec.
        states: the cells, in the grid's order.
    """

    out: Path
    grid: GridSpec
    states: list[State] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Cells by status."""
        return Counter(state.status for state in self.states)

    def done(self) -> list[State]:
        """Return the cells whose runs are finished."""
        return [state for state in self.states if state.status == "done"]

    def to_json(self) -> dict[str, Any]:
        """Return the index."""
        return {
            "format": 1,
            "grid": self.grid.model_dump(mode="json"),
            "baseline": self.grid.baseline,
            "counts": dict(self.counts),
            "cells": [state.to_json(self.out) for state in self.states],
        }

    def write_index(self) -> None:
        """Write ``grid.json``: whole or not at all."""
        files.write_json(self.out / INDEX, self.to_json())


def look(grid: GridSpec, cells: Sequence[Cell], out: str | Path) -> Bench:
    """Return how a grid's cells stand in a folder, which need not be there; nothing is written."""
    folder = Path(out).absolute()
    there = _addressed(folder / CELLS)
    known = _failures(folder / INDEX)
    states = [_state(cell, folder, there, known) for cell in cells]
    return Bench(folder, grid, states)


def _addressed(cells: Path) -> dict[str, Path]:
    """Return the folders of cells by the digits of their key: the folder is read once, however many cells there are."""
    folders = sorted(cells.iterdir(), reverse=True) if cells.is_dir() else []
    return {folder.name.rpartition("-")[2]: folder for folder in folders}


def _failures(index: Path) -> dict[str, dict[str, Any]]:
    """Return the cells that a grid's index calls failed, by their keys; none where it cannot be read."""
    try:
        cells = files.read_json(index)["cells"]
        return {cell["key"]: cell for cell in cells if cell["status"] == "failed"}
    except (OSError, HoldtrueError, LookupError, TypeError):
        return {}


def fill(
    grid: GridSpec,
    cells: Sequence[Cell],
    out: str | Path,
    engine: Engine,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Bench:
    """Execute the cells that are not done, and keep ``grid.json`` true; a cell that fails does not stop the others.

    Args:
        grid, cells: the spec, and what ``expand`` made of it.
        out: the folder; cells of an earlier grid in it are left alone.
        engine: where the cells are executed.
        progress: called with ``cell``, ``stage`` and what a run tells, and with ``done``, ``failed`` and ``cells``.
        stop: set by whoever wants it to save and stop.

    Raises:
        SpecError: ``out`` holds something else.
        RunError: another process works on the folder.
        Interrupted: a stop was asked for; the same call goes on.
    """
    folder, stop = Path(out).absolute(), stop or threading.Event()
    _check_folder(folder)
    with files.disk_errors(folder):
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
    with lock(folder), files.disk_errors(folder):
        bench = look(grid, cells, folder)
        for state in bench.states:
            state.before = state.status == "done"
            if state.status == "failed":  # is tried again
                state.status, state.error = "pending", None
        trained = Trained(folder / CELLS)
        for state in bench.states:
            if not is_run(state.folder):
                trained.fork(state.folder, state.cell.spec)
        bench.write_index()
        states = {state.cell.key: state for state in bench.states}
        jobs = [Job(s.cell.key, s.folder, s.cell.spec.canonical()) for s in bench.states if s.status != "done"]

        def tell(name: str, fields: Mapping[str, Any]) -> None:
            if progress is not None:
                counts = bench.counts
                about = {"done": counts["done"], "failed": counts["failed"], "cells": len(bench.states)}
                progress({"cell": states[name].cell.title, "run": dict(fields), **about})

        outcomes: Iterator[Outcome] = engine.run(jobs, tell, stop)
        with contextlib.closing(outcomes):  # pyright: ignore[reportArgumentType]
            for outcome in outcomes:
                _take(states[outcome.name], outcome)
                bench.write_index()
                tell(outcome.name, {"stage": outcome.status, "what": outcome.message or ""})
        left = sum(state.status in ("pending", "interrupted") for state in bench.states)
        if stop.is_set() and left:
            raise Interrupted(
                f"interrupted; {left} of {len(bench.states)} cells are left, what was done is saved in {folder}. "
                "To go on, give the same command again"
            )
        return bench


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a grid's folder; the system lets go when the process dies. ``RunError`` when another process holds it."""
    held = filelock.FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise RunError(
            f"another process is filling the grid in {folder}; wait for it, stop it first, or choose another --out"
        ) from None
    try:
        yield
    finally:
        held.release()


def _state(cell: Cell, out: Path, there: Mapping[str, Path], failed: Mapping[str, dict[str, Any]]) -> State:
    folder = there.get(cell.key[:ADDRESS], out / CELLS / cell.slug)
    state = State(cell, folder)
    if (known := failed.get(cell.key)) is not None:
        state.status, state.error, state.seconds = "failed", known.get("error"), known.get("seconds")
    if not is_run(folder):
        return state
    try:
        run = Run(folder)
        if run.is_done(STAGES[-1]):
            markers = [run.marker(stage) for stage in STAGES]
            state.status, state.seconds, state.error = "done", sum(m["seconds"] for m in markers if m), None
    except HoldtrueError as error:
        # A damaged run says so again when it is executed; the rest of the grid need not wait for it.
        state.error = {"type": type(error).__name__, "message": str(error)}
    return state


def _take(state: State, outcome: Outcome) -> None:
    state.status, state.seconds = outcome.status, outcome.seconds
    state.error = None if outcome.error is None else {"type": outcome.error, "message": outcome.message}


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder} is a file; --out names a folder")
    if not folder.exists() or (folder / INDEX).exists() or (folder / CELLS).is_dir():
        return
    if strangers := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
        raise SpecError(f"{folder} holds no grid and is not empty (it holds {strangers[0]!r}); choose another --out")
