"""holdtrue serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from holdtrue.service.settings import ServiceSettings

Home = Annotated[
    Path | None,
    typer.Option(help="Folder of the service [default: $HOLDTRUE_HOME or ~/.holdtrue].", show_default=False),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="SQLAlchemy URL of the database [default: SQLite in the folder].", show_default=False),
]
BlobUrl = Annotated[
    str | None,
    typer.Option(help="fsspec URL of the object store [default: a folder in the folder].", show_default=False),
]


def settings_with(**options: Any) -> ServiceSettings:
    """Return the settings of the environment, changed by the options that were given; ``SpecError`` for a bad one."""
    from holdtrue.service.settings import ServiceSettings

    try:
        return ServiceSettings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise SpecError(f"setting {name} (HOLDTRUE_{name.upper()}): {first['msg']}") from None


def serve(
    home: Home = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].", show_default=False)
    ] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one [default: 8000].", show_default=False)] = None,
    role: Annotated[str, typer.Option(help="all, api, dispatcher, worker or inference.")] = "all",
    database_url: DatabaseUrl = None,
    blob_url: BlobUrl = None,
    behind_tls: Annotated[
        bool, typer.Option("--behind-tls", help="A proxy with TLS is in front: listen beyond this machine.")
    ] = False,
) -> None:
    """Serve OpenAI's fine-tuning API, with your policy and a gate before release."""
    from holdtrue.service.serve import ROLES
    from holdtrue.service.serve import serve as run

    if role not in ROLES:
        raise SpecError(f"--role must be one of {', '.join(ROLES)}, and not {role!r}")
    settings = settings_with(
        home=home,
        host=host,
        port=port,
        database_url=database_url,
        blob_url=blob_url,
        behind_tls=behind_tls or None,
    )
    run(settings, role, announce=lambda line: print(line, flush=True))  # type: ignore[arg-type]
