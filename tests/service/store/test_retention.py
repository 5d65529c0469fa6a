"""What is deleted is deleted: these tests look at the object store."""

from __future__ import annotations

from io import BytesIO

import pytest
from sqlalchemy import select, update

from holdtrue.service import clock
from holdtrue.service.jobs import lifecycle
from holdtrue.service.store import retention
from holdtrue.service.store.schema import ApiKey, AuditEntry, File, GateDecision, Job, JobEvent, Model

DAY = 86_400


def keys(house) -> set[str]:
    return {stored.key for stored in house.blobs.stored()}


def blob_of(house, file_id: str) -> str | None:
    with house.db.read() as session:
        return session.scalars(select(File.blob).where(File.id == file_id)).one()


def test_an_expired_file_goes_unless_a_job_needs_it(house):
    unused, job_id = house.file(), house.job()
    needed = house.get(job_id).training_file
    with house.db.write() as session:
        session.execute(update(File).values(expires_at=clock.now() - 1))
    gone = blob_of(house, unused)
    assert retention.sweep(house.db, house.blobs, clock.now(), house.settings).files == 1
    assert blob_of(house, unused) is None
    assert not house.blobs.exists(gone)
    assert house.blobs.exists(blob_of(house, needed))
    with house.db.write() as session:
        lifecycle.request(session, session.get(Job, house.get(job_id).seq), "cancel")
    assert retention.sweep(house.db, house.blobs, clock.now(), house.settings).files == 1
    assert keys(house) == set()


def test_orphans_go_after_a_day_and_what_is_named_stays(house):
    house.job()
    orphan = house.blobs.put(BytesIO(b"x"), limit=10).key
    before = keys(house)
    assert retention.sweep(house.db, house.blobs, clock.now(), house.settings).orphans == 0
    assert keys(house) == before
    assert retention.sweep(house.db, house.blobs, clock.now() + 2 * DAY, house.settings).orphans == 1
    assert keys(house) == before - {orphan}


def test_a_deleted_model_takes_its_weights_along(house):
    job_id = house.job(hyperparameters={"n_epochs": 1})
    house.dispatch()
    house.work()
    (model,) = house.all(Model, job_id)
    with house.db.write() as session:
        session.execute(update(Model).where(Model.id == model.id).values(status="deleted", deleted_at=clock.now()))
    assert house.blobs.exists(model.adapter)
    assert retention.sweep(house.db, house.blobs, clock.now(), house.settings).models == 1
    assert not house.blobs.exists(model.adapter)


def test_a_project_that_is_erased_leaves_no_content(house):
    job_id = house.job(hyperparameters={"n_epochs": 1}, suffix="secret")
    with pytest.raises(ValueError, match="not ended"):
        retention.erase_project(house.db, house.blobs, house.tenant["project"], clock.now())
    house.dispatch()
    house.work()
    assert house.all(GateDecision, job_id)
    assert keys(house)
    retention.erase_project(house.db, house.blobs, house.tenant["project"], clock.now())
    retention.sweep(house.db, house.blobs, clock.now() + 2 * DAY, house.settings)
    assert keys(house) == set()
    assert house.all(JobEvent, job_id) == []
    with house.db.read() as session:
        assert set(session.scalars(select(File.filename))) == {""}
        assert set(session.scalars(select(Job.suffix))) == {None}
        assert None not in set(session.scalars(select(ApiKey.revoked_at)))
        assert session.scalars(select(AuditEntry.subject).where(AuditEntry.subject == job_id)).all()
