"""/v1/uploads: a file that comes in parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import IO, cast

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from holdtrue.service import audit, clock, ids, quotas
from holdtrue.service.api import files, multipart, schemas
from holdtrue.service.api.context import Caller, FilesWrite, Parts, PartsDep, hold_project
from holdtrue.service.api.errors import ApiError, invalid, not_found, responses
from holdtrue.service.api.idempotency import once
from holdtrue.service.store.away import StoreAwayError
from holdtrue.service.store.blobs import BlobError
from holdtrue.service.store.schema import File, Upload, UploadPart

LIFE_SECONDS = 3600
PART_BYTES = 64 * 2**20
_MOST_PARTS = 10_000
_FORM = multipart.form_document(["data"], {"data": {"type": "string", "format": "binary"}})
router = APIRouter(tags=["uploads"])


def _get(session: Session, project_id: str, upload_id: str, *, lock: bool = False) -> Upload:
    row = None
    if ids.is_id("upload", upload_id):
        query = select(Upload).where(Upload.id == upload_id, Upload.project_id == project_id)
        row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise not_found("Upload object", upload_id)
    return row


def _status(row: Upload) -> str:
    return "expired" if row.status == "pending" and row.expires_at <= clock.now() else row.status


def _wire(session: Session, row: Upload) -> schemas.Upload:
    file = session.scalar(select(File).where(File.id == row.file_id)) if row.file_id else None
    names = ("id", "bytes", "created_at", "expires_at", "filename", "purpose")
    values = {name: getattr(row, name) for name in names}
    shown = files.wire(file) if file is not None and file.deleted_at is None else None
    return schemas.Upload.model_validate({**values, "status": _status(row), "file": shown})


def _pending(row: Upload) -> None:
    if _status(row) != "pending":
        raise invalid(f"The upload is {_status(row)}; create a new one", "upload_id", "upload_not_pending")


@router.post("/v1/uploads", response_model=schemas.Upload, responses=responses(409))
def create_upload(body: schemas.UploadCreate, request: Request, parts: PartsDep, caller: FilesWrite) -> Response:
    """Begin an upload; it lasts an hour."""
    if body.bytes > parts.settings.upload_bytes:
        raise invalid(f"bytes must be at most {parts.settings.upload_bytes}", "bytes", "too_large")
    filename = multipart.file_name(body.filename)

    def do() -> schemas.Upload:
        quotas.check_storage(session, caller.project_id, caller.limits, body.bytes)
        now = clock.now()
        row = Upload(
            id=ids.new("upload"),
            project_id=caller.project_id,
            filename=filename,
            purpose=body.purpose,
            mime_type=body.mime_type,
            bytes=body.bytes,
            status="pending",
            file_id=None,
            file_expires_after=body.expires_after.seconds if body.expires_after else None,
            created_at=now,
            expires_at=now + LIFE_SECONDS,
        )
        session.add(row)
        session.flush()
        audit.add(session, caller.principal.key_id, "upload.create", row.id, now=now, detail={"bytes": body.bytes})
        return _wire(session, row)

    with parts.db.write() as session:
        return once(session, request, caller, body.model_dump(mode="json"), do)


@router.post(
    "/v1/uploads/{upload_id}/parts",
    response_model=schemas.UploadPart,
    responses=responses(409),
    openapi_extra=_FORM,
)
async def create_part(upload_id: str, request: Request, parts: PartsDep, caller: FilesWrite) -> Response:
    """Add a part, of 64 MB at most."""

    def check() -> None:
        with parts.db.read() as session:
            _pending(_get(session, caller.project_id, upload_id))

    await to_thread.run_sync(check)
    folder = parts.settings.home / "incoming"
    form = await multipart.receive(request, file_field="data", limit=PART_BYTES, folder=folder)
    with form.file:
        return await to_thread.run_sync(_store_part, upload_id, request, parts, caller, form)


def _store_part(upload_id: str, request: Request, parts: Parts, caller: Caller, form: multipart.Form) -> Response:
    for name in form.fields:
        raise invalid(f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
    blob = parts.blobs.put(form.file, limit=PART_BYTES)
    used = False

    def do() -> schemas.UploadPart:
        nonlocal used
        quotas.check_storage(session, caller.project_id, caller.limits, blob.bytes)
        row = _get(session, caller.project_id, upload_id, lock=True)
        _pending(row)
        query = select(func.count(), func.coalesce(func.sum(UploadPart.bytes), 0))
        count, held = session.execute(query.where(UploadPart.upload_id == upload_id)).one()
        # Twice the size, since a client may send a part again; more than that serves nobody.
        if count >= _MOST_PARTS or held + blob.bytes > 2 * max(row.bytes, 2**20):
            raise invalid("The upload has more parts than its size can need; cancel it and begin again", "data")
        part = UploadPart(
            id=ids.new("part"), upload_id=upload_id, bytes=blob.bytes, blob=blob.key, created_at=clock.now()
        )
        session.add(part)
        session.flush()
        used = True
        return schemas.UploadPart(id=part.id, created_at=part.created_at, upload_id=upload_id)

    try:
        with parts.db.write() as session:
            return once(session, request, caller, [blob.sha256, form.filename], do)
    except BaseException:
        used = False
        raise
    finally:
        if not used:
            mine = (UploadPart.upload_id == upload_id, UploadPart.blob == blob.key)
            files.discard(parts, blob.key, select(UploadPart.id).where(*mine))


@router.post("/v1/uploads/{upload_id}/complete", responses=responses(409))
def complete_upload(
    upload_id: str, body: schemas.UploadComplete, parts: PartsDep, caller: FilesWrite
) -> schemas.Upload:
    """Make a file of the parts, in the order given. Asked again, it answers the same.

    A part may be named more than once: equal parts may have one id, where one of them was sent again.
    """
    with parts.db.read() as session:
        row = _get(session, caller.project_id, upload_id)
        if row.status == "completed":
            return _wire(session, row)
        _pending(row)
        query = select(UploadPart.id, UploadPart.blob, UploadPart.bytes).where(UploadPart.upload_id == upload_id)
        known = {part.id: part for part in session.execute(query)}
        expected, filename, purpose, expires = row.bytes, row.filename, row.purpose, row.file_expires_after
    for part_id in body.part_ids:
        if part_id not in known:
            raise not_found("part", part_id, param="part_ids")
    total = sum(known[part_id].bytes for part_id in body.part_ids)
    if total != expected:
        raise invalid(f"The parts have {total} bytes together, and the upload was to have {expected}", "part_ids")
    joined = _Joined(parts, [known[part_id].blob for part_id in body.part_ids])
    blob = parts.blobs.put(cast("IO[bytes]", joined), limit=parts.settings.upload_bytes)
    used = False
    try:
        if body.md5 is not None and joined.md5.hexdigest() != body.md5.lower():
            raise invalid("The parts' MD5 is another than the one given; upload them again", "md5", "md5_mismatch")
        with parts.db.write() as session:
            hold_project(session, caller)
            row = _get(session, caller.project_id, upload_id, lock=True)
            if row.status != "completed":
                _pending(row)
                file = files.add_file(
                    session,
                    caller,
                    blob,
                    filename=filename,
                    purpose=purpose,
                    expires_after=expires,
                    upload=upload_id,
                )
                row.status, row.file_id, used = "completed", file.id, True
            answer = _wire(session, row)
    except BaseException:
        used = False
        raise
    finally:
        if not used:
            files.discard(parts, blob.key)
    _drop_parts(parts, upload_id)
    return answer


@router.post("/v1/uploads/{upload_id}/cancel", responses=responses(409))
def cancel_upload(upload_id: str, parts: PartsDep, caller: FilesWrite) -> schemas.Upload:
    """Give an upload up, and its parts."""
    with parts.db.write() as session:
        hold_project(session, caller)
        row = _get(session, caller.project_id, upload_id, lock=True)
        if row.status != "cancelled":
            _pending(row)
            row.status = "cancelled"
            audit.add(session, caller.principal.key_id, "upload.cancel", row.id, now=clock.now())
        answer = _wire(session, row)
    _drop_parts(parts, upload_id)
    return answer


def _drop_parts(parts: Parts, upload_id: str) -> None:
    with parts.db.read() as session:
        query = select(UploadPart.id, UploadPart.blob).where(UploadPart.upload_id == upload_id)
        rows = session.execute(query).all()
    try:
        for row in rows:
            parts.blobs.delete(row.blob)
    except StoreAwayError:
        return  # the dispatcher takes the parts of what is pending no more
    with parts.db.write() as session:
        session.execute(delete(UploadPart).where(UploadPart.id.in_([row.id for row in rows])))


class _Joined:
    """The parts as one stream, read once; their MD5 is known at its end."""

    def __init__(self, parts: Parts, keys: list[str]) -> None:
        self.md5 = hashlib.md5(usedforsecurity=False)
        self._streams = self._open(parts, keys)
        self._current: IO[bytes] | None = None

    def _open(self, parts: Parts, keys: list[str]) -> Iterator[IO[bytes]]:
        for key in keys:
            try:
                stream = parts.blobs.open(key)
            except BlobError:
                raise ApiError(409, "A part is gone; upload it again", param="part_ids", code="part_gone") from None
            with stream:
                yield stream

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; empty at the end."""
        size = size if size >= 0 else 2**20
        while True:
            if self._current is None:
                self._current = next(self._streams, None)
                if self._current is None:
                    return b""
            data = self._current.read(size)
            if data:
                self.md5.update(data)
                return data
            self._current = None
