"""holdtrue bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import typer

from holdtrue.cli.interrupt import stop_on_interrupt
from holdtrue.cli.output import Result, say
from holdtrue.cli.progress import ProgressView, duration
from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from holdtrue.bench import Bench, Cell, Results
    from holdtrue.bench.estimate import Known
    from holdtrue.engines import Engine

MANY = 200
"""From more cells to run than this on, the command asks first."""


def bench(
    grid: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The folder [default: grids/NAME].", show_default=False)] = None,
    engine: Annotated[str, typer.Option(help="Where cells run: local, or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Cells at a time [default: as many as fit].", show_default=False)
    ] = None,
    address: Annotated[str, typer.Option(help="Of the Ray cluster: auto, local, or HOST:PORT.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and run nothing.")] = False,
    tables: Annotated[
        bool, typer.Option("--tables", help="Write the tables of what is done, and run nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help=f"Run more than {MANY} cells without asking.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the grid.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
    ] = False,
) -> Result:
    """Run a grid of models, data, defenses and seeds, and write its tables, figures and the pick."""
    from holdtrue.bench import expand, fill, load_grid, look, write_results

    loaded = load_grid(grid, set_ or [])
    cells = expand(loaded)
    folder = out or Path("grids") / grid.stem
    before = look(loaded, cells, folder)
    chosen = _engine(engine, workers, address, before)
    if dry_run:
        return _dry_result(before, cells)
    if tables:
        if not before.done():
            raise SpecError(f"no cell of {grid} is done in {before.out}, so there is nothing to write tables of")
        return _result(before, write_results(before))
    _confirm(before, yes)
    say(f"grid: {before.out}, {len(cells)} cells, {before.counts['done']} done already")
    with stop_on_interrupt() as stop, ProgressView() as view:

        def tell(fields: dict[str, Any]) -> None:
            run = {key: value for key, value in fields["run"].items() if key != "run"}
            done = fields["done"] + fields["failed"]
            view({**run, "run": f"[{done}/{fields['cells']}] {fields['cell']}"})

        filled = fill(loaded, cells, folder, chosen, progress=tell, stop=stop)
    return _result(filled, write_results(filled))


def _engine(name: str, workers: int | None, address: str, before: Bench) -> Engine:
    from holdtrue.bench.estimate import estimate_cells, fitting_workers
    from holdtrue.engines import LocalEngine, RayEngine

    if name == "local":
        left = [state.cell for state in before.states if state.status != "done"]
        return LocalEngine(fitting_workers(estimate_cells(left)) if workers is None else workers)
    if name == "ray":
        return RayEngine(address, workers=workers)
    raise SpecError(f"--engine {name}: there are local and ray")


def _confirm(before: Bench, yes: bool) -> None:
    left = [state.cell for state in before.states if state.status != "done"]
    if yes or len(left) <= MANY:
        return
    text = f"{len(left)} cells are to be run. {_Cost.of(left).told()}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise SpecError(f"{text} To run so many without a terminal to ask on, give --yes; --dry-run lists them")
    say(text)
    if not typer.confirm("Go on?", err=True):
        raise typer.Abort


class _Cost(NamedTuple):
    """What cells take together: seconds and the peak in bytes of a cell, on a GPU and here."""

    tokens: int
    unknown: int
    gpu_seconds: float
    gpu_peak: float
    cpu_seconds: float
    cpu_peak: float

    @classmethod
    def of(cls, cells: Sequence[Cell], known: Known | None = None) -> Self:
        from holdtrue.bench.estimate import GPU, Known, estimate_cells, processor

        known = known or Known()
        gpu, cpu = (estimate_cells(cells, where, known) for where in (GPU, processor()))
        sums = [
            number
            for found in (gpu, cpu)
            for number in (sum(e.seconds or 0.0 for e in found), max((e.memory or 0.0 for e in found), default=0.0))
        ]
        return cls(sum(e.tokens for e in gpu), sum(e.seconds is None for e in gpu), *sums)

    def told(self) -> str:
        """Say it in words: for a large GPU always, and for this machine's processor where it has no GPU."""
        from holdtrue.bench.estimate import hardware

        text = f"{self.gpu_seconds / 3600:.1f} GPU hours and {self.gpu_peak / 2**30:.1f} GiB at the peak of a cell"
        if not hardware().gpu:
            text += f" on a GPU; {duration(self.cpu_seconds)} and {self.cpu_peak / 2**30:.1f} GiB on this machine's CPU"
        more = f" Of {self.unknown} the size of the model is unknown: they are not in it." if self.unknown else ""
        return f"About {self.tokens:,} training tokens, {text}.{more}"


def _dry_result(before: Bench, cells: Sequence[Cell]) -> Result:
    from holdtrue.bench.estimate import MODEL, Known, estimate_cells, hardware

    known = Known()
    estimates = estimate_cells(cells, known=known)
    left = [e for e, state in zip(estimates, before.states, strict=True) if state.status != "done"]
    cost = _Cost.of([state.cell for state in before.states if state.status != "done"], known)
    entries = [
        {**state.to_json(before.out), "estimate": each._asdict()}
        for state, each in zip(before.states, estimates, strict=True)
    ]
    document = {
        "out": str(before.out),
        "cells": entries,
        "left": len(left),
        "seconds": sum(e.seconds or 0.0 for e in left),
        "gpu_hours": cost.gpu_seconds / 3600,
        "gpu_peak_bytes": cost.gpu_peak,
        "hardware": "gpu" if hardware().gpu else "cpu",
        "model": MODEL,
    }

    def show(console: Console) -> None:
        from rich.table import Table

        table = Table("cell", "status", "tokens", "sampled tokens, at most", "memory", "time", box=None)
        for state, each in zip(before.states, estimates, strict=True):
            memory = "–" if each.memory is None else f"{each.memory / 2**30:.1f} GiB"
            seconds = "–" if each.seconds is None else duration(each.seconds)
            table.add_row(state.cell.title, state.status, f"{each.tokens:,}", f"{each.sampled:,}", memory, seconds)
        console.print(table)
        console.print(f"\n{len(left)} of {len(cells)} cells are to be run. {cost.told()}", markup=False)
        console.print(f"How this is reckoned: {MODEL}.", markup=False)

    return Result(document, show)


def _result(filled: Bench, results: Results) -> Result:
    counts = filled.counts
    failed = [state for state in filled.states if state.status == "failed"]
    document = {
        "out": str(filled.out),
        "counts": dict(counts),
        "failed": [state.to_json(filled.out) for state in failed],
        "picks": [each.to_json() | {"text": each.text()} for each in results.picks],
        "tables": str(filled.out / "tables"),
        "page": str(results.page),
    }

    def show(console: Console) -> None:
        from holdtrue.bench.tables import markdown

        console.print(markdown(results.tables, results.shares).replace("<br>", " "), markup=False, soft_wrap=True)
        for each in results.picks:
            console.print(each.text(), markup=False)
        for state in failed:
            why = state.error or {}
            console.print(f"failed: {state.cell.title}: {why.get('type')}: {why.get('message')}", markup=False)
        console.print(f"{counts['done']} of {len(filled.states)} cells are done: {results.page}", markup=False)

    return Result(document, show, exit_code=1 if failed else 0)
