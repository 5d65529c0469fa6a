"""holdtrue defenses, holdtrue models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.output import Result
from holdtrue.errors import SpecError, nearest

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def defenses(
    name: Annotated[str | None, typer.Argument(help="Describe this one.", show_default=False)] = None,
    as_json: Json = False,
) -> Result:
    """List the defenses, or describe one with its parameters."""
    from holdtrue.defenses import available, describe

    known = available()
    if name is not None and name not in known:
        raise SpecError(f"no defense is named {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    chosen = [describe(known[n]) for n in ([name] if name is not None else known)]
    documents: list[dict[str, Any]] = [
        {**info._asdict(), "parameters": [p._asdict() for p in info.parameters]} for info in chosen
    ]

    def show(console: Console) -> None:
        from rich.table import Table

        if name is None:
            table = Table("name", "badge", "paper", "what it does", box=None)
            for info in chosen:
                table.add_row(info.name, info.badge, info.paper, info.summary.split("\n")[0])
            console.print(table)
            console.print("\nholdtrue defenses NAME describes one.", markup=False)
            return
        info = chosen[0]
        console.print(f"{info.name}  ({info.badge}; {info.paper})\n\n{info.summary}\n", markup=False)
        table = Table("parameter", "type", "default", "meaning", box=None)
        for parameter in info.parameters:
            table.add_row(parameter.name, parameter.type, json.dumps(parameter.default), parameter.meaning)
        console.print(table)
        console.print(f"\nIn a spec:\ndefenses:\n  - {info.name}", markup=False)

    return Result(documents[0] if name is not None else {"defenses": documents}, show)


def models(as_json: Json = False) -> Result:
    """List the models that have a short name; any hub id or local path works too."""
    from holdtrue.models import ALIASES

    documents = [{"name": name, "hub_id": hub_id} for name, hub_id in ALIASES.items()]

    def show(console: Console) -> None:
        from rich.table import Table

        table = Table("name", "on the hub", box=None)
        for entry in documents:
            table.add_row(entry["name"], entry["hub_id"])
        console.print(table)
        console.print(
            "\nA spec's model may also be a hub id (owner/name, with a revision) or the path of a folder. "
            "Only safetensors weights are read, and no model's own code is run.",
            markup=False,
        )

    return Result({"models": documents}, show)
