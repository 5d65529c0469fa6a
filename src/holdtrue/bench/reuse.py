"""Cells that were trained already, under a spec that measured something else."""

from __future__ import annotations

from pathlib import Path

from holdtrue.bench.cells import ADDRESS, address
from holdtrue.errors import HoldtrueError
from holdtrue.runs import Run, is_run
from holdtrue.runs.spec import RunSpec


class Trained:
    """The trained runs of a grid's folder, by what decides their adapters.

    A run counts as long as every file that it read is what it was: its address is taken anew and must be its folder's.
    """

    def __init__(self, cells: Path) -> None:
        self._cells = cells
        self._hashes: dict[str, str] = {}
        self._found: dict[str, Run] | None = None

    def fork(self, folder: Path, spec: RunSpec) -> bool:
        """Begin a cell with the adapter of a run that differs in what it measures; return whether there is one."""
        if self._found is None:
            self._found = self._look()
        run = self._found.get(self._key(spec))
        if run is None:
            return False
        run.fork(folder, spec)
        return True

    def _look(self) -> dict[str, Run]:
        found: dict[str, Run] = {}
        for folder in sorted(self._cells.iterdir()):
            try:
                run = Run(folder) if is_run(folder) else None
                if run is None or not run.is_done("finalise"):
                    continue
                if folder.name.endswith(f"-{address(run.spec, self._hashes)[:ADDRESS]}"):
                    found[self._key(run.spec)] = run
            except HoldtrueError:
                continue  # damaged, or its files are gone: it is trained again
        return found

    def _key(self, spec: RunSpec) -> str:
        """Return the address of the spec with the same measurement for all."""
        same = {"evaluate": {"suites": ["likelihood"]}, "gate": None}
        return address(RunSpec(**{**spec.canonical(), **same}), self._hashes)
