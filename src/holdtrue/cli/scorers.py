"""holdtrue scorers build, holdtrue scorers list."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.interrupt import stop_on_interrupt
from holdtrue.cli.output import Result
from holdtrue.cli.progress import ProgressView
from holdtrue.models import ALIASES

if TYPE_CHECKING:
    from rich.console import Console

    from holdtrue.selection import Scorer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]

app = typer.Typer(
    help="Build and list the misaligned models that choose safe rows for `interleave`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("build")
def build(
    data: Annotated[
        list[Path] | None, typer.Argument(help="Chat files of malicious rows, a domain each.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the scorers; the same call goes on there.")] = Path(
        "scorers"
    ),
    domain: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A file under another name than its own.", show_default=False),
    ] = None,
    model: Annotated[str, typer.Option(help="The base model: alias, hub id or folder.")] = next(iter(ALIASES)),
    revision: Annotated[str | None, typer.Option(help="Of a hub id.", show_default=False)] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows drawn of each file [default: all].", show_default=False)
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows drawn and of training.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Another training or adapter key.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> Result:
    """Train an adapter without a defense on each file. These models are misaligned on purpose: do not release them."""
    from holdtrue.runs import Control, build_scorers, domains_of

    settings = [f"training.epochs={epochs}", f"training.seed={seed}", *(set_ or [])]
    domains = domains_of(data or [], domain or [])
    with stop_on_interrupt() as stop, ProgressView() as view:
        built = build_scorers(
            domains,
            out,
            model=model,
            revision=revision,
            rows=rows,
            settings=settings,
            control=Control(progress=view, stop=stop),
        )
    return _result(built)


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of scorers.", show_default=False)],
    as_json: Json = False,
) -> Result:
    """List the scorers in a folder, and what each was trained on."""
    from holdtrue.selection import list_scorers

    return _result(list_scorers(folder))


def _result(scorers: list[Scorer]) -> Result:
    documents: list[dict[str, Any]] = [
        {**s.to_json(), "provenance": s.provenance.model_dump(mode="json") if s.provenance else None} for s in scorers
    ]

    def show(console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("domain", "rows", "data", "base model", "folder", box=None)
        for scorer in scorers:
            cells = ["unknown", "", "", ""]
            if found := scorer.provenance:
                data = f"{found.data.file} ({found.data.sha256[:12]})"
                cells = [found.domain, str(found.rows), data, f"{found.base.name} at {found.base.revision[:24]}"]
            # What a folder says of itself is no markup.
            table.add_row(*(Text(cell) for cell in (*cells, str(scorer.folder))))
        console.print(table)

    return Result({"scorers": documents}, show)
