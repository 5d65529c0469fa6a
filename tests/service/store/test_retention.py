"""What is deleted is deleted: these tests look at the object store, at every row, and at the bytes of the disk."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from sqlalchemy import inspect, select, text, update

from holdtrue.errors import SpecError
from holdtrue.service import audit, auth, clock, ids, quotas
from holdtrue.service.jobs import events, lifecycle
from holdtrue.service.store import erasure, retention
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.schema import (
    ApiKey,
    AuditEntry,
    File,
    GateDecision,
    IdempotentRequest,
    Job,
    JobEvent,
    JobState,
    Model,
    Upload,
    UploadPart,
)
from support import chat

DAY = 86_400


def keys(house) -> set[str]:
    return {stored.key for stored in house.blobs.stored()}


def blob_of(house, file_id: str) -> str | None:
    with house.db.read() as session:
        return session.scalars(select(File.blob).where(File.id == file_id)).one()


def sweep(house, later: int = 0) -> retention.Swept:
    return retention.sweep(house.db, house.blobs, clock.now() + later, house.settings)


def put(house, content: bytes = b"x") -> str:
    return house.blobs.put(BytesIO(content), limit=100).key


def add_upload(house, status: str, *, expires: int) -> str:
    """Write an upload with one part, and return the part's key."""
    key = put(house)
    with house.db.write() as session:
        upload = Upload(
            id=ids.new("upload"), project_id=house.tenant["project"], filename="u", purpose="batch", mime_type="",
            bytes=1, status=status, file_id=None, file_expires_after=None, created_at=0, expires_at=expires,
        )  # fmt: skip
        session.add(upload)
        session.flush()
        session.add(UploadPart(id=ids.new("part"), upload_id=upload.id, bytes=1, blob=key, created_at=0))
    return key


def add_model(house, status: str, job_id: str | None = None, kind: str = "tuned") -> str:
    """Write a model with its gate's decision as a job leaves them, and return the adapter's key."""
    key = put(house)
    job_id = job_id or house.job()
    with house.db.write() as session:
        session.add(
            Model(
                id=ids.new("model"), name=ids.new("model"), project_id=house.tenant["project"], kind=kind,
                status=status, base_model=house.base, job_id=job_id, adapter=key, adapter_digest="0" * 64,
                created_at=0, deleted_at=None,
            )
        )  # fmt: skip
        session.add(decision(job_id, key, attempt=0, action="release"))
    return key


def decision(job_id: str, key: str, *, attempt: int, action: str) -> GateDecision:
    return GateDecision(
        id=ids.new("gate"), job_id=job_id, attempt=attempt, outcome="pass", report={}, adapter=key,
        adapter_digest="0" * 64, action=action, override=None, override_by=None, override_reason=None,
        override_at=None, created_at=0,
    )  # fmt: skip


def add_state(house, job_id: str) -> set[str]:
    state = JobState(job_id=job_id, attempt=0, rows=put(house), rest=put(house), saved_at=0)
    with house.db.write() as session:
        session.add(state)
    return {state.rest, state.rows or ""}


def test_an_expired_file_goes_unless_a_job_needs_it(house):
    unused, job_id = house.file(), house.job()
    needed = house.get(job_id).training_file
    with house.db.write() as session:
        session.execute(update(File).values(expires_at=clock.now()))
    gone = blob_of(house, unused)
    assert sweep(house).files == 1
    assert blob_of(house, unused) is None
    assert not house.blobs.exists(gone)
    assert house.blobs.exists(blob_of(house, needed))
    with house.db.write() as session:
        lifecycle.request(session, session.get(Job, house.get(job_id).seq), "cancel")
    assert sweep(house).files == 1
    assert keys(house) == set()
    with house.db.read() as session:
        assert set(session.scalars(select(File.filename))) == {""}
        told = session.scalars(select(AuditEntry.subject).where(AuditEntry.action == "file.expire")).all()
        assert set(told) == {unused, needed}
        assert audit.verify(session).broken is None


def test_a_deletion_that_was_cut_short_is_finished(house):
    file_id, other = house.file(), house.file()
    with house.db.write() as session:  # as the API leaves it when it is killed before the content is gone
        session.execute(update(File).where(File.id == file_id).values(deleted_at=clock.now(), filename=""))
    stays = blob_of(house, other)
    assert sweep(house).files == 1
    assert blob_of(house, file_id) is None
    assert keys(house) == {stays}


def test_uploads_expire_and_leave_no_parts_however_they_ended(house):
    now = clock.now()
    pending = add_upload(house, "pending", expires=now + 100)
    for status, expires in (("pending", now), ("completed", now + 100), ("cancelled", now + 100), ("expired", now)):
        add_upload(house, status, expires=expires)
    assert len(keys(house)) == 5
    assert sweep(house).uploads == 1
    assert keys(house) == {pending}
    with house.db.read() as session:
        assert session.scalars(select(UploadPart.blob)).all() == [pending]
        assert sorted(session.scalars(select(Upload.status))) == [
            "cancelled",
            "completed",
            "expired",
            "expired",
            "pending",
        ]
    assert sweep(house, 101).uploads == 1
    assert keys(house) == set()


def test_orphans_go_after_a_day_and_what_is_named_stays(house):
    job_id = house.job()
    add_state(house, job_id)
    add_upload(house, "pending", expires=clock.now() + 3 * DAY)
    for status in ("ready", "held", "blocked"):
        add_model(house, status)
    before = keys(house)
    orphans = {put(house), house.blobs.put_tree(_folder(house))[0]}
    assert sweep(house).orphans == 0
    assert keys(house) == before | orphans
    assert sweep(house, 2 * DAY).orphans == 2
    assert keys(house) == before


def _folder(house):
    folder = house.folder / "tree"
    folder.mkdir()
    (folder / "a").write_text("a")
    return folder


def test_a_deleted_models_adapter_goes_and_an_equal_one_of_another_job_stays(house):
    deleted, held = add_model(house, "deleted"), add_model(house, "held")
    with house.db.write() as session:  # a deleted model without a digest
        session.execute(update(Model).where(Model.adapter == deleted).values(adapter_digest=None))
    assert sweep(house, 2 * DAY)[2] == 1
    assert not house.blobs.exists(deleted)
    assert house.blobs.exists(held)
    with house.db.read() as session:
        assert set(session.scalars(select(GateDecision.adapter))) == {"", held}


def test_adapters_of_trainings_that_were_done_again_go_with_the_jobs_model(house):
    first, second = house.job(), house.job()
    add_model(house, "ready", first)
    checkpoint = add_model(house, "deleted", second, "checkpoint")
    again = {job_id: put(house) for job_id in (first, second)}
    with house.db.write() as session:
        session.add_all(decision(job_id, key, attempt=1, action="retrain") for job_id, key in again.items())
    before = keys(house)
    assert sweep(house).models == 1
    assert before - keys(house) == {checkpoint}
    with house.db.write() as session:
        session.execute(update(Model).where(Model.job_id == first).values(status="deleted"))
    assert sweep(house).models == 1
    assert not house.blobs.exists(again[first])
    assert house.blobs.exists(again[second])
    with house.db.read() as session:
        assert set(session.scalars(select(GateDecision.adapter))) == {"", again[second]}


def test_an_ended_jobs_state_goes_and_a_paused_ones_stays(house):
    ended, paused = house.job(), house.job()
    add_state(house, ended)
    stays = add_state(house, paused)
    with house.db.write() as session:
        lifecycle.request(session, session.get(Job, house.get(ended).seq), "cancel")
        lifecycle.request(session, session.get(Job, house.get(paused).seq), "pause")
    before = keys(house)
    swept = sweep(house)
    assert swept.states == 1
    assert len(before - keys(house)) == 2
    assert stays < keys(house)


def test_kept_answers_go_after_a_day(house):
    with house.db.write() as session:
        for key, age in (("old", DAY + 1), ("new", DAY - 60)):
            session.add(
                IdempotentRequest(
                    project_id="p", key=key, request_digest="", status_code=200, body="", created_at=clock.now() - age
                )
            )
    assert sweep(house).requests == 1
    with house.db.read() as session:
        assert session.scalars(select(IdempotentRequest.key)).all() == ["new"]


class Dying(Blobs):
    """A store whose user dies at the so-manyth deletion, before it or after it."""

    def __init__(self, url: str, at: int, *, before: bool) -> None:
        super().__init__(url)
        self.left, self.before = at, before

    def delete(self, key: str) -> None:
        self.left -= 1
        if not (self.left == 0 and self.before):
            super().delete(key)
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", [1, 3])
def test_a_sweep_that_dies_leaves_nothing_that_the_next_does_not_find(house, at, before):
    for _ in range(2):
        house.file()
    with house.db.write() as session:
        session.execute(update(File).values(expires_at=1))
    add_upload(house, "pending", expires=1)
    stays = add_model(house, "ready", house.job())
    stays = {stays, *(blob_of(house, house.get(job).training_file) for job in _jobs(house))}
    with pytest.raises(KeyboardInterrupt):
        retention.sweep(
            house.db, Dying(house.settings.blobs, at, before=before), clock.now(), house.settings, orphans=False
        )
    with house.db.read() as session:  # no row names what is gone
        for key in session.scalars(select(File.blob).where(File.blob.is_not(None))):
            assert house.blobs.exists(key)
        assert session.scalars(select(UploadPart.id)).all() == []
    sweep(house, 2 * DAY)
    assert keys(house) == stays


def _jobs(house) -> list[str]:
    with house.db.read() as session:
        return list(session.scalars(select(Job.id)))


def test_several_sweep_at_once(house, monkeypatch):
    monkeypatch.setattr(retention, "_AT_ONCE", 5)  # a share for each
    for _ in range(20):
        house.file()
        add_upload(house, "pending", expires=1)
    with house.db.write() as session:
        session.execute(update(File).values(expires_at=1))
    found: list[retention.Swept] = []
    threads = [threading.Thread(target=lambda: found.append(sweep(house)), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert sum(swept.files for swept in found) == sum(swept.uploads for swept in found) == 20
    assert keys(house) == set()
    with house.db.read() as session:
        told = session.scalars(select(AuditEntry.subject).where(AuditEntry.action == "file.expire")).all()
        assert len(told) == len(set(told)) == 20
        assert audit.verify(session).broken is None


def test_a_sweep_and_an_erasure_do_not_wait_for_each_other(house):
    """Both change files, what their project stores, and the audit log."""
    project, begun = house.tenant["project"], threading.Event()
    house.file()
    with house.db.write() as session:
        session.execute(update(File).values(expires_at=1))

    def erase() -> None:
        with house.db.write() as session:  # as erase_project does, which would be too quick to meet
            quotas.lock_project(session, project)
            begun.set()
            time.sleep(1)
            session.execute(update(File).values(sha256=""))
            audit.add(session, "somebody", "project.erase", project, now=clock.now())

    with ThreadPoolExecutor(1) as pool:
        erased = pool.submit(erase)
        assert begun.wait(20)
        assert sweep(house).files == 1
        erased.result(20)
    with house.db.read() as session:
        assert audit.verify(session).broken is None


SECRET = "Zanzibar"


def test_a_project_that_is_erased_leaves_no_word_of_its_own(house):
    rows = [chat(f"What of {SECRET} {number}?", f"{SECRET} is {number}.") for number in range(12)]
    job_id = house.job(
        rows,
        hyperparameters={"n_epochs": 1},
        suffix=SECRET,
        integrations={"wandb": {"project": SECRET}},
        metadata={"k": SECRET},
    )
    with pytest.raises(SpecError, match="not ended"):
        erasure.erase_project(house.db, house.blobs, house.tenant["project"], clock.now())
    house.dispatch()
    house.work()
    add_state(house, job_id)
    add_upload(house, "pending", expires=clock.now() + 100)
    with house.db.write() as session:
        job = session.get_one(Job, house.get(job_id).seq)
        job.error = {"code": "c", "message": SECRET, "param": None}
        events.add(session, job, SECRET)
        session.execute(update(Upload).values(filename=SECRET))
        session.execute(update(File).values(filename=SECRET))
        session.execute(update(GateDecision).values(report={"decisions": [], "evidence": [{"answer": SECRET}]}))
        auth.create(session, project_id=house.tenant["project"], name=SECRET, role="member", now=clock.now())
        session.add(
            IdempotentRequest(
                project_id=house.tenant["project"], key="k", request_digest="", body=SECRET, created_at=clock.now()
            )
        )
    assert _words(house)
    assert keys(house)
    erased = erasure.erase_project(house.db, house.blobs, house.tenant["project"], clock.now(), actor="me")
    assert erased.jobs == 1
    assert erased.content >= 5
    assert not _words(house)
    sweep(house, 2 * DAY)  # what a worker had put down for another, and no row names any more
    assert keys(house) == set()
    house.work()  # the worker's own folder goes when it looks for work
    remains = [path for path in house.folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert remains == []
    with house.db.read() as session:
        assert session.scalars(select(JobEvent.id)).all() == []
        assert None not in set(session.scalars(select(ApiKey.revoked_at)))
        assert {"model.release", "project.erase"} <= set(session.scalars(select(AuditEntry.action)))
        assert audit.verify(session).broken is None
        assert session.scalars(select(AuditEntry.actor).where(AuditEntry.action == "project.erase")).all() == ["me"]
    assert erasure.erase_project(house.db, house.blobs, house.tenant["project"], clock.now()).content == 0


def _words(house) -> list[str]:
    """Return the tables in which the customer's word stands."""
    with house.db.read() as session:
        return [
            table
            for table in inspect(house.db.engine).get_table_names()
            if any(SECRET in str(row) for row in session.execute(text(f"SELECT * FROM {table}")))
        ]


def test_only_a_project_that_is_there_is_erased(house):
    with pytest.raises(SpecError, match="no project"):
        erasure.erase_project(house.db, house.blobs, "proj-none", clock.now())
