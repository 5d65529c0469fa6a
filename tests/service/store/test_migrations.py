from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import func, insert, inspect, select, text, update
from sqlalchemy.exc import IntegrityError

from holdtrue.errors import RunError
from holdtrue.service import clock, ids, quotas, tenancy
from holdtrue.service.jobs import leases, lifecycle
from holdtrue.service.store import migrations
from holdtrue.service.store.schema import Base, File, Job, JobEvent, JobMetadata, Policy, Project


def tables(db) -> set[str]:
    return set(inspect(db.engine).get_table_names()) - {"alembic_version"}


def test_the_schema_is_what_the_migrations_make(db):
    assert migrations.current(db) == migrations.head()
    assert tables(db) == set(Base.metadata.tables)
    with db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_many_upgrade_at_once(empty_db):
    failed: list[Exception] = []

    def up() -> None:
        try:
            migrations.upgrade(empty_db)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=up, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert tables(empty_db) == set(Base.metadata.tables)


def test_several_processes_upgrade_a_new_database_at_once(empty_db):
    code = """
import sys
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database
migrations.upgrade(Database(sys.argv[1]))
"""
    url = empty_db.url.render_as_string(hide_password=False)
    started = [subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE) for _ in range(4)]
    for process in started:
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told.decode()
    migrations.check(empty_db)


def lease_a_job(db) -> leases.Lease:
    """Make a job that a worker holds."""
    with db.write() as session:
        now = clock.now()
        organization = tenancy.create_organization(session, "a", "a", now=now)
        project = tenancy.create_project(session, organization.id, "a", now=now)
        policy = Policy(
            id=ids.new("policy"),
            base_model="b",
            version=1,
            document="{}",
            digest="0" * 64,
            created_by="x",
            created_at=now,
        )
        session.add(policy)
        session.flush()
        job = lifecycle.create(
            session, project_id=project.id, organization_id=organization.id, created_by="x", model="b", base_model="b",
            parent_model_id=None, training_file="file-x", validation_file=None, suffix=None, seed=1, hyperparameters={},
            integrations=None, policy_id=policy.id, metadata={"k": "v"},
        )  # fmt: skip
        lifecycle.move(session, job, "queued", "queued")
    lease = leases.take(db, "w", 600)
    assert lease is not None
    return lease


def stored_file(project: str, size: int, **fields) -> File:
    return File(
        **{
            "id": ids.new("file"), "project_id": project, "filename": "f", "purpose": "fine-tune", "bytes": size,
            "sha256": "0" * 64, "blob": None, "created_at": 1, "expires_at": None, "deleted_at": None,
            "status_details": None,
        }
        | fields
    )  # fmt: skip


def rows(db) -> dict[str, list[tuple]]:
    """Return every row of every table of today's schema."""
    with db.read() as session:
        return {
            name: sorted(tuple(map(str, row)) for row in session.execute(select(table)))
            for name, table in Base.metadata.tables.items()
        }


def test_an_upgrade_keeps_a_job_in_flight_and_its_holder(db):
    lease = lease_a_job(db)
    before = rows(db)
    migrations.upgrade(db)
    assert rows(db) == before
    assert lease.renew() == "run"
    with db.read() as session:
        assert session.scalars(select(Job.status)).one() == "running"
        assert len(session.scalars(select(JobEvent.id)).all()) == 4


NEXT = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "next", "0005", None, None

def upgrade():
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        table.alter_column("suffix", existing_type=sa.String(64), type_=sa.String(100))
        table.create_check_constraint("priority", "priority >= 0")
    op.execute("UPDATE jobs SET priority = 5")
    # after

def downgrade():
    with op.batch_alter_table("jobs") as table:
        table.drop_constraint("priority", type_="check")
        table.alter_column("suffix", existing_type=sa.String(100), type_=sa.String(64))
        table.drop_column("priority")
"""


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts a later revision beside those of today."""
    folder = tmp_path / "later"
    folder.mkdir()
    plain = migrations._config

    def config():
        found = plain()
        shipped = Path(migrations.__file__).parent / "alembic" / "versions"
        found.set_main_option("version_locations", f"{shipped}:{folder}")
        found.set_main_option("path_separator", ":")
        return found

    monkeypatch.setattr(migrations, "_config", config)
    return (folder / "next.py").write_text


def test_a_changed_table_keeps_its_rows_up_and_down_with_a_job_in_flight(db, later):
    lease = lease_a_job(db)
    before = rows(db)
    later(NEXT)
    with pytest.raises(RunError, match="revision 0005"):
        migrations.check(db)
    migrations.upgrade(db)
    migrations.check(db)
    assert rows(db) == before
    with db.read() as session:
        assert session.scalars(text("SELECT priority FROM jobs")).all() == [5]
    assert lease.renew() == "run"
    before = rows(db)
    migrations.downgrade(db, "0005")
    assert rows(db) == before
    assert lease.renew() == "run"
    with db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    with pytest.raises(IntegrityError), db.write() as session:  # rules were kept as well
        session.execute(text("UPDATE jobs SET status = 'dancing'"))


def test_stored_bytes_are_counted_up_and_down_with_a_job_in_flight(db):
    lease = lease_a_job(db)
    with db.write() as session:
        project = session.scalars(select(Project.id)).one()
        session.add_all([stored_file(project, 100), stored_file(project, 20), stored_file(project, 3, deleted_at=1)])
    before = rows(db)
    migrations.downgrade(db, "0001")
    with db.write() as session:
        session.execute(text("UPDATE files SET deleted_at = 2 WHERE bytes = 20"))
    migrations.upgrade(db)
    with db.read() as session:
        assert session.scalars(select(Project.stored_bytes)).one() == 100
    with db.write() as session:
        session.execute(text("UPDATE files SET deleted_at = NULL WHERE bytes = 20"))
        session.execute(text("UPDATE projects SET stored_bytes = 120"))
    assert rows(db) == before
    assert lease.renew() == "run"


def test_metadata_find_their_job_and_project_up_and_down(db):
    lease = lease_a_job(db)
    before = rows(db)
    migrations.downgrade(db, "0002")
    assert "tagged" not in {column["name"] for column in inspect(db.engine).get_columns("jobs")}
    assert {column["name"] for column in inspect(db.engine).get_columns("job_metadata")} == {"job_id", "key", "value"}
    with db.read() as session:
        assert session.execute(text("SELECT key, value FROM job_metadata")).all() == [("k", "v")]
    migrations.upgrade(db)
    assert rows(db) == before
    assert lease.renew() == "run"
    with db.read() as session:
        pair, job = session.scalars(select(JobMetadata)).one(), session.scalars(select(Job)).one()
        assert (pair.job_id, pair.project_id, pair.seq) == (job.id, job.project_id, job.seq)
        assert job.tagged
    with db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


@pytest.mark.parametrize("fault", ["raise ValueError", "op.execute('DELETE FROM projects')"])
def test_a_migration_that_fails_changes_nothing(db, later, fault):
    lease = lease_a_job(db)
    before = rows(db)
    later(NEXT.replace("# after", fault))
    with pytest.raises((ValueError, RunError, IntegrityError)):
        migrations.upgrade(db)
    assert migrations.current(db) == "0005"
    assert rows(db) == before
    assert "priority" not in {column["name"] for column in inspect(db.engine).get_columns("jobs")}
    assert lease.renew() == "run"
    with pytest.raises(IntegrityError), db.write() as session:  # foreign keys are checked again
        session.execute(text("DELETE FROM projects"))


def test_stored_bytes_are_the_sum_of_what_is_not_deleted(db):
    """Whoever writes, however often, and at the same time."""
    with db.write() as session:
        organization = tenancy.create_organization(session, "a", "a", now=1)
        first, second = (tenancy.create_project(session, organization.id, name, now=1).id for name in "ab")
        files = [stored_file(project, 10**i) for project in (first, second) for i in range(6)]
        session.add_all(files)
        session.execute(
            insert(File),
            [
                {c.name: getattr(one, c.name) for c in File.__table__.columns if c.name not in ("seq", "status")}
                | {"id": ids.new("file"), "bytes": 7, "status": "processed"}
                for one in files[:3]
            ],
        )
        deleted = [one.id for one in files[:4]]

    def check(project: str, expected: int) -> None:
        with db.read() as session:
            assert quotas.stored_bytes(session, project) == expected
            left = select(func.sum(File.bytes)).where(File.project_id == project, File.deleted_at.is_(None))
            assert session.scalar(left) == expected

    check(first, 111_111 + 21)
    check(second, 111_111)

    def delete_all() -> None:
        for file_id in deleted:
            with db.write() as session:
                session.execute(update(File).where(File.id == file_id).values(deleted_at=2))

    threads = [threading.Thread(target=delete_all, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(first, 110_000 + 21)
    check(second, 111_111)
    with contextlib.suppress(ZeroDivisionError), db.write() as session:
        session.add(stored_file(first, 10**9))
        session.flush()
        raise ZeroDivisionError  # what is rolled back does not count
    check(first, 110_000 + 21)


def test_down_to_nothing_and_up_again(db):
    migrations.downgrade(db, "base")
    assert tables(db) == set()
    migrations.upgrade(db)
    assert tables(db) == set(Base.metadata.tables)


def test_a_database_of_the_future_is_left_alone(db):
    with db.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for act in (migrations.upgrade, migrations.check, lambda db: migrations.downgrade(db, "base")):
        with pytest.raises(RunError, match="9999"):
            act(db)


def test_a_database_without_tables_is_told_from_an_old_one(empty_db):
    assert migrations.current(empty_db) is None
    with pytest.raises(RunError, match="no tables"):
        migrations.check(empty_db)
