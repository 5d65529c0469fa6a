"""holdtrue backup, restore: a service's copy, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdtrue.cli.keys import ACTOR, AsJson
from holdtrue.cli.output import Result
from holdtrue.cli.serve import BlobUrl, DatabaseUrl, Home, settings_with

if TYPE_CHECKING:
    from rich.console import Console


def backup(
    to: Annotated[Path, typer.Option(help="A folder that is not there yet; it appears when all is in it.")],
    home: Home = None,
    database_url: DatabaseUrl = None,
    blob_url: BlobUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Copy a service as it is at one moment: database, content, signing key. It may go on working meanwhile."""
    from holdtrue.service import clock
    from holdtrue.service.store import backup as store

    settings = settings_with(home=home, database_url=database_url, blob_url=blob_url)
    made = store.backup(settings, to, now=clock.now(), actor=ACTOR)
    document = {**made.model_dump(exclude={"content"}), "to": str(to), "pieces": len(made.content)}

    def show(console: Console) -> None:
        console.print(f"{to}: the database at revision {made.revision}, {len(made.content)} pieces of content")
        console.print(
            f"The audit log has {made.audit_entries} entries; keep its last digest elsewhere: {made.audit_head}",
            soft_wrap=True,
        )
        if made.missing:
            console.print(f"The object store does not have, or not whole: {', '.join(made.missing)}", soft_wrap=True)

    return Result(document, show, exit_code=1 if made.missing else 0)


def restore(
    source: Annotated[Path, typer.Option("--from", help="A folder that `holdtrue backup` made.")],
    home: Home = None,
    blob_url: BlobUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Bring a service back into a folder that is not there yet, once all of the backup has been checked."""
    from holdtrue.service import clock
    from holdtrue.service.store import backup as store

    settings = settings_with(home=home, blob_url=blob_url)
    made, verdict = store.restore(settings, source, now=clock.now(), actor=ACTOR)
    whole = verdict.broken is None and verdict.head == made.audit_head
    document = {
        "home": str(settings.home),
        "made_at": made.made_at,
        "pieces": len(made.content),
        "missing": made.missing,
        "audit_whole": whole,
    }

    def show(console: Console) -> None:
        console.print(f"{settings.home}: {len(made.content)} pieces of content; start it with `holdtrue serve`")
        if made.missing:
            console.print(f"The backup never had: {', '.join(made.missing)}", soft_wrap=True)
        if not whole:
            console.print("The audit log is not the one that was copied; see `holdtrue audit verify`", soft_wrap=True)

    return Result(document, show, exit_code=0 if whole and not made.missing else 1)
