"""holdtrue train, holdtrue resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.interrupt import stop_on_interrupt
from holdtrue.cli.output import Result, say
from holdtrue.cli.progress import ProgressView, duration
from holdtrue.errors import GateError

if TYPE_CHECKING:
    from rich.console import Console

    from holdtrue.runs import Run

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def train(
    spec: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The run's directory [default: runs/NAME-HASH].", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the spec.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> Result | None:
    """Tune a model as a spec says, measure it, and keep all in one directory."""
    from holdtrue.runs import Run, default_out, load_spec

    loaded = load_spec(spec, set_ or [])
    return _work(Run.create(out or default_out(loaded, spec), loaded))


def resume(
    run: Annotated[Path, typer.Argument(help="A run's directory.", show_default=False)], as_json: Json = False
) -> Result | None:
    """Go on with a run that was interrupted; a run that is done is left as it is."""
    from holdtrue.runs import Run

    return _work(Run(run))


def _work(run: Run) -> Result | None:
    from holdtrue.runs import Control, execute, rank

    if rank() == 0:
        say(f"run: {run.path}")
    with stop_on_interrupt() as stop, ProgressView() as view:
        worked = execute(run, Control(progress=view if rank() == 0 else None, stop=stop))
    return run_result(run, worked) if rank() == 0 else None


def run_result(run: Run, worked: bool) -> Result:
    """Return what a finished run has to tell."""
    from holdtrue.runs import brief, compare_runs

    markers = {stage: run.marker(stage) for stage in run.stages}
    document: dict[str, Any] = {
        "run": str(run.path),
        "status": "done" if worked else "nothing to do",
        "adapter": str(run.adapter),
        "stages": {s: {"seconds": m["seconds"], **m["report"]} for s, m in markers.items() if m},
        "evaluations": [brief(record) for record in run.evaluations()],
        "gate": run.gate,
        "screen": run.screen,
    }
    outcome = None if run.gate is None else run.gate["outcome"]

    def show(console: Console) -> None:
        from holdtrue.cli.tables import comparison_table, gate_table

        if worked:
            total = sum(m["seconds"] for m in markers.values() if m)
            console.print(f"done in {duration(total)}", markup=False)
        else:
            console.print("nothing to do: this run is done already", markup=False)
        comparison = compare_runs([run])
        if comparison.measures:
            console.print(comparison_table(comparison))
        if run.gate is not None:
            console.print(gate_table(run.gate))
        console.print(f"adapter: {run.adapter}", markup=False, soft_wrap=True)
        console.print(f"beside another run: holdtrue compare {run.path} OTHER", markup=False, soft_wrap=True)

    return Result(document, show, exit_code=0 if outcome in (None, "pass") else GateError.exit_code)
