from __future__ import annotations

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select, text

from holdtrue.errors import RunError
from holdtrue.service import clock, ids, tenancy
from holdtrue.service.jobs import leases, lifecycle
from holdtrue.service.store import migrations
from holdtrue.service.store.schema import Base, Job, JobEvent, Policy


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

    threads = [threading.Thread(target=up) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert tables(empty_db) == set(Base.metadata.tables)


def test_an_upgrade_keeps_a_job_in_flight_and_its_holder(db):
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
            integrations=None, policy_id=policy.id,
        )  # fmt: skip
        lifecycle.move(session, job, "queued", "queued")
    lease = leases.take(db, "w", 60)
    assert lease is not None
    migrations.upgrade(db)
    assert lease.renew() == "run"
    with db.read() as session:
        assert session.scalars(select(Job.status)).one() == "running"
        assert len(session.scalars(select(JobEvent.id)).all()) == 4


def test_down_to_nothing_and_up_again(db):
    migrations.downgrade(db, "base")
    assert tables(db) == set()
    migrations.upgrade(db)
    assert tables(db) == set(Base.metadata.tables)


def test_a_database_of_the_future_is_left_alone(db):
    with db.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RunError, match="9999"):
        migrations.upgrade(db)
