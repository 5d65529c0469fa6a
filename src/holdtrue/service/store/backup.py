"""Copies a service whole, while it runs, and brings it back: database, content, and the key that signs."""

from __future__ import annotations

import contextlib
import secrets
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError

from holdtrue.errors import RunError, SpecError
from holdtrue.models.digest import file_digest
from holdtrue.runs.files import sync_folder, sync_tree, write_text
from holdtrue.service import audit
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.blobs import BlobError, Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.named import named

DATABASE, CONTENT, MANIFEST = "service.db", "blobs", "manifest.json"
_KEYS = ("signing-key.pem", "signing-key.pem.pub")
_ROUNDS = 3
"""How often what came meanwhile is copied before writers have to wait for the last of it."""


class Manifest(BaseModel):
    """What a backup says of itself.

    Attributes:
        format: of the folder.
        holdtrue: the version that wrote it.
        made_at: seconds since 1970.
        revision: of the database's schema.
        database: SHA-256 of the database's file.
        audit_entries, audit_head: length and last digest of the audit log. Kept elsewhere too, the digest shows later
            whether the log was cut off.
        content: SHA-256, or a folder's digest, by key in the object store.
        missing: keys that rows name and the object store did not hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    holdtrue: str
    made_at: int
    revision: str
    database: str
    audit_entries: int
    audit_head: str
    content: dict[str, str]
    missing: tuple[str, ...] = ()


class Restored(NamedTuple):
    """What was brought back, and what the audit log's check says of it."""

    manifest: Manifest
    audit: audit.Verdict


def backup(settings: ServiceSettings, to: Path, *, now: int, actor: str) -> Manifest:
    """Copy a service into a new folder, as it is at one moment. The service may go on working meanwhile.

    Content is copied first, while anybody may write; then writers wait for the little that came since and for the
    database. The folder holds all that customers sent, and the private key that signs receipts.

    Args:
        settings: of the service.
        to: a folder that is not there yet, or empty; it appears when all is in it.
        now: in seconds since 1970.
        actor: who does this, for the audit log.

    Raises:
        SpecError: the database is not SQLite, there is no service, or the folder is in use.
        RunError: the database is damaged, or of another version, or there is no room for it.
        OSError: the disk is full. Nothing is left behind, here as above.
    """
    db = Database(settings.database)
    with contextlib.closing(db):
        source = _sqlite_file(db, _dump_command(db, to))
        if not source.is_file():
            raise SpecError(f"there is no service in {settings.home}; name its folder with --home")
        _check_free(to, "backup")
        migrations.check(db)
        with _appearing(to, MANIFEST) as draft:
            return _save(db, source, settings, draft, now=now, actor=actor)


def restore(settings: ServiceSettings, source: Path, *, now: int, actor: str) -> Restored:
    """Bring a service back from a backup into a home that is not there yet, or empty.

    Everything is checked against what the backup says of itself before the home appears. Where the settings name an
    object store, the content goes there; what it holds already stays.

    Raises:
        SpecError: no backup, a home in use, or a database that the settings put elsewhere.
        RunError: the backup is damaged, or of a later version of holdtrue.
    """
    manifest = _read_manifest(source)
    if settings.database_url:
        database = Database(settings.database_url)
        with contextlib.closing(database):
            _sqlite_file(database, _restore_command(database))
        raise SpecError("the database is restored into the home: leave the database's URL away, and move it afterwards")
    _check_free(settings.home, "home")
    if (found := file_digest(source / DATABASE)) != manifest.database:
        raise RunError(f"{source / DATABASE} is damaged: its SHA-256 is {found}, not {manifest.database}")
    with _appearing(settings.home, DATABASE) as draft:
        target = Blobs(settings.blob_url or f"file://{draft / CONTENT}")
        _bring_content(Blobs(f"file://{(source / CONTENT).absolute()}"), target, manifest, draft)
        for name in (DATABASE, *_KEYS):
            if (source / name).exists():
                shutil.copy2(source / name, draft / name)
        db = Database(f"sqlite:///{draft / DATABASE}")
        with contextlib.closing(db):
            migrations.upgrade(db)
            with db.read() as session:
                verdict = audit.verify(session)
            with db.write() as session:
                audit.add(session, actor, "service.restore", "", now=now, detail={"made_at": manifest.made_at})
            db.empty_log()
        return Restored(manifest, verdict)


def _save(db: Database, source: Path, settings: ServiceSettings, draft: Path, *, now: int, actor: str) -> Manifest:
    blobs, target = Blobs(settings.blobs), Blobs(f"file://{draft / CONTENT}")
    content: dict[str, str] = {}
    for _ in range(_ROUNDS):
        with db.read() as session:
            wanted = named(session) - content.keys()
        _copy(blobs, target, wanted, content, draft)
    with db.write() as session:  # nobody else writes until this has ended
        wanted = named(session)
        _copy(blobs, target, wanted - content.keys(), content, draft)
        _copy_database(source, draft / DATABASE)
        audit.add(session, actor, "service.backup", "", now=now, detail={"content": len(wanted & content.keys())})
    for key in content.keys() - wanted:
        target.delete(key)
        del content[key]
    if settings.signing_key is None:
        for name in _KEYS:
            if (settings.home / name).exists():
                shutil.copy2(settings.home / name, draft / name)
    copied = Database(f"sqlite:///{draft / DATABASE}")
    with contextlib.closing(copied):
        revision = migrations.current(copied)
        with copied.read() as session:
            verdict = audit.verify(session)
    manifest = Manifest(
        holdtrue=version("holdtrue"),
        made_at=now,
        revision=str(revision),
        database=_settled_digest(draft / DATABASE),
        audit_entries=verdict.entries,
        audit_head=verdict.head,
        content=dict(sorted(content.items())),
        missing=tuple(sorted(wanted - content.keys())),
    )
    write_text(draft / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _copy(blobs: Blobs, target: Blobs, keys: set[str], content: dict[str, str], place: Path) -> None:
    for key in sorted(keys):
        with contextlib.suppress(BlobError):  # deleted meanwhile, or lost: who asks last says which
            content[key] = blobs.copy(key, target, place)


def _copy_database(source: Path, target: Path) -> None:
    try:
        with (
            contextlib.closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True)) as old,
            contextlib.closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)
            (verdict,) = new.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        raise RunError(f"the database {source} cannot be copied: {error}; is there room, and is it whole?") from error
    if verdict != "ok":
        raise RunError(f"the database {source} is damaged: {verdict}")


def _settled_digest(path: Path) -> str:
    """Make a database one plain file, without a log beside it, and return its digest."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    return file_digest(path)


def _bring_content(source: Blobs, target: Blobs, manifest: Manifest, place: Path) -> None:
    for key, digest in manifest.content.items():
        there = target.exists(key)  # of an earlier try, or in a store that outlived its database
        found = target.digest(key, place) if there else source.copy(key, target, place)
        if found != digest:
            where = "the object store" if there else "the backup"
            raise RunError(f"{key} in {where} is damaged: its digest is {found}, not {digest}")


def _read_manifest(source: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json((source / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise SpecError(f"{source} is no backup: it has no {MANIFEST}") from None
    except ValidationError as error:
        raise RunError(f"{source / MANIFEST} is damaged: {error.errors()[0]['msg']}") from None
    if manifest.format != 1:
        raise RunError(f"the backup has format {manifest.format}, which this version does not know: update holdtrue")
    return manifest


def _check_free(folder: Path, what: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder} is not empty; a {what} goes into a folder that is not there yet")


@contextlib.contextmanager
def _appearing(folder: Path, last: str) -> Iterator[Path]:
    """Yield a folder that takes its name, whole and on the disk, once this has ended without an error.

    A folder that is there, empty, may be where a disk is mounted, and cannot be replaced: it gets the content piece by
    piece, and ``last``, which makes it what it is, after all others.
    """
    folder = folder.absolute()
    inside = folder.is_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = f".{folder.name}.{secrets.token_hex(4)}"
    draft = folder / name if inside else folder.with_name(name)
    draft.mkdir(mode=0o700)
    try:
        yield draft
        sync_tree(draft)
        if inside:
            folder.chmod(0o700)
            for piece in sorted(draft.iterdir(), key=lambda piece: piece.name == last):
                piece.rename(folder / piece.name)
            sync_folder(folder)
        else:
            draft.rename(folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sqlite_file(db: Database, command: Callable[[], str]) -> Path:
    if not db.is_sqlite:
        raise SpecError(command())
    if not db.url.database or db.url.database == ":memory:":
        raise SpecError("a database in memory cannot be copied")
    return Path(db.url.database)


def _dump_command(db: Database, to: Path) -> Callable[[], str]:
    return lambda: (
        "PostgreSQL is copied by its own tool, which has the password from PGPASSWORD or ~/.pgpass:\n  "
        + shlex.join(["pg_dump", "--format=custom", f"--file={to / 'service.dump'}", _plain_url(db)])
        + "\nCopy the object store before that and again after it; docs/operations.md says more"
    )


def _restore_command(db: Database) -> Callable[[], str]:
    return lambda: (
        "PostgreSQL is brought back by its own tool, into an empty database:\n  "
        + shlex.join(["pg_restore", "--no-owner", "--exit-on-error", f"--dbname={_plain_url(db)}", "service.dump"])
    )


def _plain_url(db: Database) -> str:
    """Return the database's URL as PostgreSQL's tools read it, without a password."""
    url = db.url.difference_update_query(["password"]).set(drivername="postgresql")
    return url._replace(password=None).render_as_string(hide_password=False)
