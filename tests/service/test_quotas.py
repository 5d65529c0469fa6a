"""What a project may store, on both databases."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select

from holdtrue.service import clock, ids, quotas, tenancy
from holdtrue.service.quotas import Limits, QuotaError, RateLimiter
from holdtrue.service.store.schema import File, Project, Upload, UploadPart


@pytest.fixture
def project(db) -> str:
    with db.write() as session:
        organization = tenancy.create_organization(session, "a", "a", now=1)
        return tenancy.create_project(session, organization.id, "a", now=1).id


def file(project: str, size: int) -> File:
    return File(
        id=ids.new("file"), project_id=project, filename="f", purpose="fine-tune", bytes=size, sha256="0" * 64,
        blob=None, created_at=1, expires_at=None, deleted_at=None, status_details=None,
    )  # fmt: skip


def upload(session, project: str, status: str, size: int) -> str:
    row = Upload(
        id=ids.new("upload"), project_id=project, filename="u", purpose="batch", mime_type="", bytes=size,
        status=status, file_id=None, file_expires_after=None, created_at=0, expires_at=1,
    )  # fmt: skip
    session.add(row)
    session.flush()
    session.add_all(
        UploadPart(id=ids.new("part"), upload_id=row.id, bytes=size // 2, blob="b", created_at=0) for _ in range(2)
    )
    return row.id


def test_uploads_at_the_same_time_do_not_pass_the_limit_together(db, project):
    limits, barrier, refused = Limits(storage_bytes=100), threading.Barrier(6), []

    def add() -> None:
        barrier.wait(30)
        try:
            with db.write() as session:
                quotas.lock_project(session, project)
                quotas.check_storage(session, project, limits, 60)
                session.add(file(project, 60))
        except QuotaError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=add, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert refused == ["storage_bytes"] * 5
    with db.read() as session:
        assert session.scalars(select(Project.stored_bytes)).one() == 60


def test_parts_of_unfinished_uploads_take_room(db, project):
    limits = Limits(storage_bytes=100)
    with db.write() as session:
        session.add(file(project, 30))
        pending = upload(session, project, "pending", 40)
        for status in ("completed", "cancelled", "expired"):
            upload(session, project, status, 50)
    with db.write() as session:
        quotas.check_storage(session, project, limits, 30)
        with pytest.raises(QuotaError, match="30 stored and the 40 of unfinished uploads"):
            quotas.check_storage(session, project, limits, 31)
        quotas.check_storage(session, project, limits, 70, upload=pending)  # the parts become this file


def test_a_mark_has_its_time_and_ends():
    rates, now = RateLimiter(), clock.microseconds()
    assert rates.mark("a") == 0
    rates.set_mark("a", 100, now)
    assert rates.mark("a") == now
    rates.set_mark("a", 1, now + 5)
    assert rates.mark("a") == now + 5
    assert rates.mark("b") == 0
    threading.Event().wait(1.2)
    assert rates.mark("a") == 0


def test_marks_that_are_set_at_once_are_no_later_than_they_are():
    """Two processes both clear a mark, and then both add their time."""
    rates, now = RateLimiter(), clock.microseconds()
    rates.set_mark("a", 100, now)
    rates._storage.incr("a", 100, now + 2)
    assert rates.mark("a") == now + 1
