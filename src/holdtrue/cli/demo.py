"""holdtrue demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdtrue.cli.interrupt import stop_on_interrupt
from holdtrue.cli.output import Result
from holdtrue.cli.progress import ProgressView
from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A handful of rows: under four minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All rows that holdtrue ships.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the runs and the report go [default: runs/demo].", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
    ] = False,
) -> Result:
    """Tune a small model on reckless advice, with and without defenses, and show what it does to the model."""
    if quick and full:
        raise SpecError("choose one of --quick and --full")
    size = "quick" if quick else "full" if full else "normal"
    from holdtrue.runs.demo import run_demo

    place = out or Path("runs") / ("demo" if size == "normal" else f"demo-{size}")
    with stop_on_interrupt() as stop, ProgressView() as view:
        found = run_demo(size, place, progress=view, stop=stop)

    def show(console: Console) -> None:
        from holdtrue.cli.tables import comparison_table

        console.print(comparison_table(found.comparison))
        console.print("A harmless task, arithmetic whose operators mean something else: what does a defense cost it?")
        console.print(comparison_table(found.benign))
        for note in found.notes:
            console.print(note, markup=False)
        console.print(f"report: {found.report}", markup=False, soft_wrap=True)

    document = {
        **found.comparison.to_json(),
        "benign": found.benign.to_json(),
        "notes": list(found.notes),
        "report": str(found.report),
        "size": size,
    }
    return Result(document, show)
