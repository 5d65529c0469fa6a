"""A service is copied while it works, lost, and brought back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update

from holdtrue.cli.main import main
from holdtrue.errors import RunError, SpecError
from holdtrue.service import audit, clock
from holdtrue.service.evidence import signing
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import backup as store
from holdtrue.service.store import migrations, retention
from holdtrue.service.store.backup import Manifest, backup, restore
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.named import named
from holdtrue.service.store.schema import AuditEntry, Base, File, Receipt
from house import House, build_house


@pytest.fixture
def house(tmp_path: Path, tiny_dir: Path) -> Iterator[House]:
    db = Database(f"sqlite:///{tmp_path / 'service.db'}")
    migrations.upgrade(db)
    yield build_house(db, tmp_path, tiny_dir)
    db.close()


@contextlib.contextmanager
def opened(house: House, home: Path) -> Iterator[House]:
    """Yield the house that a restored home is."""
    settings = house.settings.model_copy(update={"home": home, "database_url": ""})
    db = Database(settings.database)
    yield House(settings, db, Blobs(settings.blobs), house.base, house.folder, house.tenant)
    db.close()


def save(house: House, to: Path) -> Manifest:
    return backup(house.settings, to, now=clock.now(), actor="me")


def bring(home: Path, source: Path, **settings: Any) -> None:
    restore(ServiceSettings(home=home, **settings), source, now=clock.now(), actor="me")


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_service_comes_back_with_its_jobs_and_goes_on(house, tmp_path, capfd):
    done = house.job(hyperparameters={"n_epochs": 1})
    house.dispatch()
    house.work()
    stop = threading.Event()
    stop.set()
    halfway = house.job(hyperparameters={"n_epochs": 1})
    house.dispatch()
    house.work(stop)
    assert house.get(halfway).status == "queued"
    orphan = house.blobs.put(BytesIO(b"orphan"), limit=10).key
    before = house.visible(done)
    to, home = tmp_path / "copies" / "monday", tmp_path / "again"
    where = ["--home", str(house.settings.home), "--database-url", house.settings.database_url]
    capfd.readouterr()
    assert main(["backup", "--to", str(to), *where, "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert stat.S_IMODE(to.stat().st_mode) == 0o700
    assert left(to) == {"service.db", "blobs", "manifest.json", "signing-key.pem", "signing-key.pem.pub"}
    house.db.close()
    shutil.move(house.settings.home, tmp_path / "lost")

    assert main(["restore", "--from", str(to), "--home", str(home), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["audit_whole"] is True
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    with opened(house, home) as again:
        assert again.visible(done) == before
        with again.db.read() as session:
            assert {stored.key for stored in again.blobs.stored()} == named(session)
            receipt = session.scalars(select(Receipt)).first()
            assert receipt is not None
            signing.verify(receipt.envelope, signing.public_pem(signing.signer_of(again.settings)))
            actions = session.scalars(select(AuditEntry.action).order_by(AuditEntry.seq)).all()
            assert actions[-1] == "service.restore"
            verdict = audit.verify(session)
            assert (verdict.broken, verdict.entries) == (None, made["audit_entries"] + 1)
        assert not again.blobs.exists(orphan)
        assert again.work()
        assert again.get(halfway).status == "succeeded"
    with house.db.read() as session:
        assert session.scalars(select(AuditEntry.action).order_by(AuditEntry.seq.desc())).first() == "service.backup"


def test_a_copy_made_while_others_write_is_of_one_moment(house, tmp_path):
    stop, failed = threading.Event(), []

    def write() -> None:
        try:
            while not stop.is_set():
                ids = [house.file(f"{number}".encode()) for number in range(4)]
                with house.db.write() as session:  # as the API deletes, and dies before the content is gone
                    session.execute(update(File).where(File.id.in_(ids[1:])).values(deleted_at=clock.now()))
                retention.sweep(house.db, house.blobs, clock.now(), house.settings, orphans=False)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            assert save(house, tmp_path / f"copy-{number}").missing == ()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    for number in range(3):
        bring(tmp_path / f"home-{number}", tmp_path / f"copy-{number}")
        with opened(house, tmp_path / f"home-{number}") as again, again.db.read() as session:
            assert {stored.key for stored in again.blobs.stored()} == named(session)
            for row in session.scalars(select(File).where(File.deleted_at.is_(None))):
                assert row.blob is not None
                with again.blobs.open(row.blob) as stream:
                    assert hashlib.sha256(stream.read()).hexdigest() == row.sha256


def test_writers_wait_while_the_database_is_copied(house, tmp_path, monkeypatch):
    copy_database, waited = store._copy_database, []

    def look(source: Path, target: Path) -> None:
        with contextlib.closing(sqlite3.connect(source, timeout=0)) as other:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            assert other.execute("SELECT count(*) FROM projects").fetchone() == (1,)  # readers do not
        waited.append(source)
        copy_database(source, target)

    monkeypatch.setattr(store, "_copy_database", look)
    save(house, tmp_path / "copy")
    assert len(waited) == 1
    house.file()


def test_an_empty_folder_that_is_there_is_filled(house, tmp_path):
    house.file()
    to, home = tmp_path / "copy", tmp_path / "again"
    to.mkdir()
    home.mkdir()
    inodes = to.stat().st_ino, home.stat().st_ino
    save(house, to)
    bring(home, to)
    assert (to.stat().st_ino, home.stat().st_ino) == inodes
    assert left(home) == {"service.db", "blobs"}


def test_content_goes_to_the_object_store_that_the_settings_name(house, tmp_path):
    house.file()
    kept = house.file(b"kept")
    save(house, tmp_path / "copy")
    place = tmp_path / "store"
    bring(tmp_path / "one", tmp_path / "copy", blob_url=f"file://{place}")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("b-*")}
    assert len(before) == 2
    bring(tmp_path / "two", tmp_path / "copy", blob_url=f"file://{place}")  # what is there is not written again
    assert {path: path.stat().st_mtime_ns for path in place.rglob("b-*")} == before
    with house.db.read() as session:
        key = session.scalars(select(File.blob).where(File.id == kept)).one()
    (path,) = place.rglob(str(key))
    path.write_bytes(b"other")
    with pytest.raises(RunError, match="object store is damaged"):
        bring(tmp_path / "three", tmp_path / "copy", blob_url=f"file://{place}")
    assert path.read_bytes() == b"other"
    assert not (tmp_path / "three").exists()


def test_what_the_store_lost_is_told(house, tmp_path, capfd):
    house.file()
    with house.db.read() as session:
        (key,) = named(session)
    house.blobs.delete(key)
    where = ["--home", str(house.settings.home), "--database-url", house.settings.database_url, "--json"]
    capfd.readouterr()
    assert main(["backup", "--to", str(tmp_path / "copy"), *where]) == 1
    assert json.loads(capfd.readouterr().out)["missing"] == [key]
    assert main(["restore", "--from", str(tmp_path / "copy"), "--home", str(tmp_path / "again"), "--json"]) == 1
    assert (tmp_path / "again" / "service.db").exists()


@pytest.mark.parametrize("what", ["content", "database", "manifest", "gone"])
def test_a_damaged_copy_is_refused_and_no_home_appears(house, tmp_path, what):
    house.file()
    save(house, tmp_path / "copy")
    content = next((tmp_path / "copy" / "blobs").rglob("b-*"))
    path = {
        "content": content,
        "gone": content,
        "database": tmp_path / "copy" / "service.db",
        "manifest": tmp_path / "copy" / "manifest.json",
    }[what]
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    if what == "gone":
        path.unlink()
    before = left(tmp_path)
    with pytest.raises(RunError):
        bring(tmp_path / "again", tmp_path / "copy")
    assert left(tmp_path) == before


def test_a_full_disk_leaves_no_copy(house, tmp_path):
    house.file()
    before, limit = left(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limit[1]))
    try:
        with pytest.raises(RunError, match="room"):
            save(house, tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert left(tmp_path) == before
    save(house, tmp_path / "copy")


def test_what_is_in_use_or_not_there_is_refused(house, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a").touch()
    with pytest.raises(SpecError, match="not empty"):
        save(house, tmp_path / "used")
    save(house, tmp_path / "copy")
    with pytest.raises(SpecError, match="not empty"):
        save(house, tmp_path / "copy")
    with pytest.raises(SpecError, match="not empty"):
        bring(house.settings.home, tmp_path / "copy")
    with pytest.raises(SpecError, match="no backup"):
        bring(tmp_path / "again", tmp_path / "used")
    with pytest.raises(SpecError, match="no service"):
        backup(ServiceSettings(home=tmp_path / "none"), tmp_path / "x", now=0, actor="me")
    with pytest.raises(SpecError, match="leave the database's URL away"):
        bring(tmp_path / "again", tmp_path / "copy", database_url=f"sqlite:///{tmp_path / 'x.db'}")
    assert left(tmp_path) >= {"used", "copy"}
    assert not left(tmp_path) & {"again", "none", "x", "x.db"}


@pytest.mark.parametrize(
    "url",
    ["postgresql://me:secret@db.example:5433/tuning", "postgresql+psycopg://me@db.example:5433/tuning?password=secret"],
)
def test_postgresql_is_told_its_own_commands(house, tmp_path, url):
    settings = ServiceSettings(home=tmp_path / "home-of-it", database_url=url)
    with pytest.raises(SpecError) as told:
        backup(settings, tmp_path / "a copy", now=0, actor="me")
    command = (
        f"pg_dump --format=custom '--file={tmp_path}/a copy/service.dump' postgresql://me@db.example:5433/tuning\n"
    )
    assert command in str(told.value)
    assert "secret" not in str(told.value)
    save(house, tmp_path / "copy")
    with pytest.raises(SpecError, match=r"pg_restore .* --dbname=postgresql://me@db.example:5433/tuning service.dump"):
        restore(settings, tmp_path / "copy", now=0, actor="me")
    assert not settings.home.exists()


def test_postgresqls_own_commands_bring_everything_back(postgres, postgres_url, tmp_path, tiny_dir):
    if not (postgres.bin / "pg_dump").exists():
        pytest.skip("pg_dump is not installed")
    db = Database(postgres_url)
    migrations.upgrade(db)
    house = build_house(db, tmp_path, tiny_dir)
    house.job()
    _run(postgres.bin, lambda: save(house, tmp_path), tmp_path)
    rows = _rows(db)
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE again"))
    other = house.settings.model_copy(update={"database_url": postgres.url + "again", "home": tmp_path / "again"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.json").write_text(
        Manifest(
            holdtrue="", made_at=0, revision="", database="", audit_entries=0, audit_head="", content={}
        ).model_dump_json()
    )
    _run(postgres.bin, lambda: restore(other, tmp_path / "empty", now=0, actor="me"), tmp_path)
    again = Database(other.database)
    migrations.check(again)
    assert _rows(again) == rows
    again.close()
    db.close()


def _run(programs: Path, refused: Callable[[], Any], folder: Path) -> None:
    """Run the command that a refusal names."""
    with pytest.raises(SpecError) as told:
        refused()
    command = next(line.strip() for line in str(told.value).splitlines() if line.startswith("  pg_"))
    subprocess.run(f"{programs}/{command}", shell=True, check=True, cwd=folder)


def _rows(db: Database) -> dict[str, list[str]]:
    with db.read() as session:
        return {
            name: sorted(str(tuple(row)) for row in session.execute(select(table)))
            for name, table in Base.metadata.tables.items()
        }
