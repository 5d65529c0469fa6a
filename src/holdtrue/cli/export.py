"""holdtrue export: a run's model for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdtrue.cli.output import Result


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="One checkpoint, that needs no adapter.")] = False,
    force_with_reason: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Export although the gate has not passed; the reason is kept.", show_default=False
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
    ] = False,
) -> Result:
    """Write a run's adapter, or its merged model, to a folder; refused unless its gate has passed."""
    from holdtrue.runs import Run
    from holdtrue.runs.export import export_run

    record = export_run(Run(run), out, merge=merge, reason=force_with_reason)
    what = "a checkpoint" if merge else "an adapter"
    gate = f"gate: {record['gate'] or 'never asked'}"
    return Result(
        {"out": str(out), **record},
        lambda console: console.print(f"{out}: {what} of {record['run']} ({gate})", markup=False, soft_wrap=True),
    )
