"""holdtrue policy: what a provider demands of every job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.keys import ACTOR, AsJson, opened, table
from holdtrue.cli.output import Result
from holdtrue.cli.serve import DatabaseUrl, Home
from holdtrue.errors import SpecError
from holdtrue.models import ALIASES

if TYPE_CHECKING:
    from rich.console import Console

    from holdtrue.service.store.schema import Policy

app = typer.Typer(help="Check, put in force and compare policies.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="A YAML file.")]
Base = Annotated[str, typer.Option("--base", help="The base model that the policy is for.")]
_FIRST = next(iter(ALIASES))


@app.command("validate")
def validate(file: File, as_json: AsJson = False) -> Result:
    """Read a policy and say what it comes to, or all that is wrong with it."""
    from holdtrue.service.policy import check_paths, parse_policy
    from holdtrue.service.policy.store import digest

    document = parse_policy(_read(file), str(file))
    check_paths(document)
    values = {"base_model": document.base_model, "sha256": digest(document), "document": document.canonical()}

    def show(console: Console) -> None:
        names = ", ".join(defense.name for defense in document.defenses) or "none: models are tuned without a defense"
        console.print(f"{file}: valid, for {document.base_model}", markup=False)
        console.print(f"  defenses: {names}", markup=False)
        console.print(f"  gate: {', '.join(f'{n} <= {v}' for n, v in document.gate.limits().items())}", markup=False)
        console.print(f"  trainings after a failed gate: {len(document.on_fail.retrain)}, then {document.on_fail.then}")

    return Result(values, show)


@app.command("activate")
def activate(
    file: Annotated[Path | None, typer.Argument(help="A YAML file: a new version.", show_default=False)] = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="An earlier version instead of a file.", show_default=False)
    ] = None,
    base: Base = _FIRST,
    note: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Put a policy in force for new jobs; jobs that have begun keep the version they began with."""
    from holdtrue.service import clock
    from holdtrue.service.policy import store

    if (file is None) == (version is None):
        raise SpecError("give a FILE, or --version with a number, and not both")
    now = clock.now()
    with opened(home, database_url) as session:
        if file is not None:
            row = store.save(session, _read(file), actor=ACTOR, now=now, note=note)
        else:
            assert version is not None
            row = store.version(session, base, version)
            store.document_of(row)
        before = store.activate(session, row, actor=ACTOR, now=now)
        was = None if before is None else before.version
        values = _values(row) | {"before": was}

    def show(console: Console) -> None:
        then = "" if was is None else f" (before: version {was})"
        console.print(f"in force for {values['base_model']}: version {values['version']}{then}", markup=False)

    return Result(values, show)


@app.command("diff")
def diff(
    old: Annotated[int, typer.Argument(help="A version.")],
    new: Annotated[int | None, typer.Argument(help="Another [default: the one in force].", show_default=False)] = None,
    base: Base = _FIRST,
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Say what differs between two versions, value by value and line by line."""
    from holdtrue.service.policy import store

    with opened(home, database_url) as session:
        other = store.active(session, base) if new is None else store.version(session, base, new)
        if other is None:
            raise SpecError(f"no policy is in force for {base}; name two versions")
        found = store.change(store.version(session, base, old), other)

    def show(console: Console) -> None:
        for line in found.values or ("the two say the same",):
            console.print(line, markup=False, soft_wrap=True)
        console.print(found.text, markup=False, soft_wrap=True)

    return Result({"values": list(found.values), "text": found.text}, show)


@app.command("history")
def history(
    base: Base = _FIRST, home: Home = None, database_url: DatabaseUrl = None, as_json: AsJson = False
) -> Result:
    """List all versions of a base model's policy, the newest first."""
    from holdtrue.service.policy import store

    with opened(home, database_url) as session:
        current = store.active(session, base)
        rows = [
            _values(row) | {"in_force": "yes" if current is not None and row.id == current.id else ""}
            for row in store.history(session, base)
        ]
    if not rows:
        raise SpecError(f"there is no policy for {base}; `holdtrue policy activate FILE` makes the first")
    return table(rows, ("version", "in_force", "created_at", "created_by", "sha256", "note"))


def _values(row: Policy) -> dict[str, Any]:
    names = ("base_model", "version", "note", "created_by", "created_at")
    return {**{name: getattr(row, name) for name in names}, "sha256": row.digest}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} cannot be read: {error}") from None
