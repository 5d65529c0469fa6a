"""holdtrue verify: is this adapter what the service signed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.keys import AsJson, opened
from holdtrue.cli.output import Result
from holdtrue.cli.serve import DatabaseUrl, Home, settings_with
from holdtrue.errors import RunError, SpecError

if TYPE_CHECKING:
    from rich.console import Console


def verify(
    model: Annotated[str, typer.Argument(help="A folder with an adapter, or the name of a model of a service here.")],
    receipt: Annotated[
        Path | None, typer.Option(help="The receipt of a folder's adapter, as the API gives it.", show_default=False)
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="The provider's public key in PEM [default: that of the service here].", show_default=False),
    ] = None,
    home: Home = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> Result:
    """Check the signature of a model's receipt, and that the adapter is byte for byte the one it speaks of."""
    from holdtrue.service.evidence import signing

    settings = settings_with(home=home, database_url=database_url)
    if key is not None:
        public = _bytes(key)
    else:
        public = signing.public_pem(signing.load_signer(settings.signing_key or settings.home / signing.HOME_KEY))
    if Path(model).is_dir():
        if receipt is None:
            raise SpecError("name the receipt of the folder's adapter with --receipt")
        found = signing.read_envelope(receipt)
        statement = signing.check_adapter(Path(model), found.get("envelope", found), public)
    else:
        statement = _stored(model, settings, home, database_url, public)
    return Result(statement, lambda console: _show(console, statement))


def _stored(name: str, settings: Any, home: Path | None, database_url: str | None, public: bytes) -> dict[str, Any]:
    from sqlalchemy import select

    from holdtrue.service.evidence import signing
    from holdtrue.service.scratch import Scratch
    from holdtrue.service.store.blobs import Blobs
    from holdtrue.service.store.schema import Model, Receipt

    with opened(home, database_url) as session:
        row = session.scalar(select(Model).where(Model.name == name))
        if row is None:
            raise SpecError(f"{name} is no folder, and no model of the service in {settings.home}")
        newest = select(Receipt).where(Receipt.model_id == row.id).order_by(Receipt.created_at.desc(), Receipt.id)
        found = session.scalars(newest.limit(1)).first()
        if found is None or row.adapter is None:
            raise RunError(f"{name} has no receipt, or its weights were deleted: there is nothing to verify")
        place, envelope, status = row.adapter, found.envelope, row.status
    with Scratch(settings.home) as folder:
        adapter = folder / "adapter"
        Blobs(settings.blobs).fetch_tree(place, adapter)
        return {"status": status, **signing.check_adapter(adapter, envelope, public)}


def _show(console: Console, statement: dict[str, Any]) -> None:
    predicate = statement["predicate"]
    (subject,) = statement["subject"]
    defenses = ", ".join(each["name"] for each in predicate["defenses"]) or "none"
    lines = [
        f"verified: {subject['name']}",
        f"  adapter   {subject['digest']['sha256']}",
        f"  policy    version {predicate['policy']['version']} of {predicate['policy']['base_model']}",
        f"  defenses  {defenses}",
        f"  gate      {predicate['gate']['outcome']}, then {predicate['action']}",
    ]
    if predicate["override"]:
        lines.append(f"  decided   {predicate['override']['decision']} by {predicate['override']['by']}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from None
