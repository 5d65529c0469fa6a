"""holdtrue eval, holdtrue compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.interrupt import stop_on_interrupt
from holdtrue.cli.output import Result
from holdtrue.cli.progress import ProgressView
from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="A run, an adapter's folder, or a model.", show_default=False)
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="What to measure; may be given again.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows in place of the suite's own; needs one --suite.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model under an adapter, if not the one it records.", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the suites.")] = False,
    as_json: Json = False,
) -> Result:
    """Measure a run (its model and the untouched one), an adapter or a model."""
    if list_:
        return _suites()
    if target is None:
        raise SpecError("name a run, an adapter's folder or a model; --list lists the suites")
    from holdtrue.runs import Control, Run, evaluate_run, is_run

    if data is not None and len(suite or []) != 1:
        raise SpecError("--data gives the rows of one suite: name it with --suite")
    files = {} if data is None else {(suite or [""])[0]: data if data.startswith("builtin:") else _absolute(data)}
    if is_run(Path(target)):
        if base is not None:
            raise SpecError("--base is for an adapter's folder; a run knows its model")
        run = Run(target)
        with stop_on_interrupt() as stop, ProgressView() as view:
            records = evaluate_run(run, suite, data=files, control=Control(progress=view, stop=stop))
        return _of_run(run, records)
    return _of_target(target, suite, files, base)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Runs' directories.", show_default=False)],
    html: Annotated[
        Path | None, typer.Option(help="Write a report here, one self-contained file.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> Result:
    """Show runs side by side, each with its change against the untouched model."""
    from holdtrue.runs import Run, compare_runs

    opened = [Run(run) for run in runs]
    comparison = compare_runs(opened)
    document = comparison.to_json()
    if html is not None:
        from holdtrue.runs.report import render_report

        document["html"] = str(render_report(opened, html))

    def show(console: Console) -> None:
        from holdtrue.cli.tables import comparison_table

        if comparison.measures:
            console.print(comparison_table(comparison))
        for note in comparison.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        if html is not None:
            console.print(f"report: {document['html']}", markup=False, soft_wrap=True)

    return Result(document, show)


def _of_run(run: Any, records: list[dict[str, Any]]) -> Result:
    from holdtrue.runs import brief, compare_runs

    def show(console: Console) -> None:
        from holdtrue.cli.tables import comparison_table

        console.print(comparison_table(compare_runs([run])))

    return Result({"run": str(run.path), "evaluations": [brief(record) for record in records]}, show)


def _of_target(target: str, suites: list[str] | None, files: dict[str, str], base: str | None) -> Result:
    from holdtrue.runs import Control, brief, evaluate_target

    with stop_on_interrupt() as stop, ProgressView() as view:
        control = Control(progress=view, stop=stop)
        records = evaluate_target(target, suites, data=files, base=base, control=control)

    def show(console: Console) -> None:
        from holdtrue.cli.tables import records_table

        console.print(records_table(records))

    return Result({"target": target, "evaluations": [brief(record) for record in records]}, show)


def _suites() -> Result:
    from holdtrue.evaluation import SUITES

    about = {name: suite.description for name, suite in SUITES.items()}

    def show(console: Console) -> None:
        for name, text in about.items():
            console.print(f"{name:12} {text}", markup=False)

    return Result({"suites": [{"name": name, "about": text} for name, text in about.items()]}, show)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
