"""/v1/files: a customer's data, and the results of jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Select, or_, select
from sqlalchemy.orm import Session

from holdtrue.service import audit, clock, ids, quotas
from holdtrue.service.api import multipart, schemas
from holdtrue.service.api.context import Caller, FilesRead, FilesWrite, Parts, PartsDep, hold_project
from holdtrue.service.api.errors import ApiError, invalid, not_found, responses
from holdtrue.service.api.idempotency import once
from holdtrue.service.api.pages import After, Order, take
from holdtrue.service.quotas import ACTIVE
from holdtrue.service.store.away import StoreAwayError
from holdtrue.service.store.blobs import Blob, BlobError
from holdtrue.service.store.schema import File, Job

BATCH_SECONDS = 30 * 86_400
_PURPOSE: TypeAdapter[str] = TypeAdapter(schemas.FilePurpose)
_CHUNK = 2**18
_FORM = multipart.form_document(
    ["file", "purpose"],
    {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
)
router = APIRouter(tags=["files"])


def visible(project_id: str, now: int) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions under which a file is there for a tenant."""
    return (File.project_id == project_id, *_there(now))


def _there(now: int) -> tuple[ColumnElement[bool], ...]:
    return (File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > now))


def get_file(session: Session, project_id: str, file_id: str, *, param: str = "id") -> File:
    """Return a tenant's file; 404 for another's, a deleted one, and what is no id at all."""
    row = None
    if ids.is_id("file", file_id):
        row = session.scalar(select(File).where(File.id == file_id, *visible(project_id, clock.now())))
    if row is None:
        raise not_found("File object", file_id, param=param)
    return row


def wire(row: File) -> schemas.FileObject:
    """Return a file as the wire has it."""
    names = ("id", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details")
    return schemas.FileObject.model_validate({name: getattr(row, name) for name in names})


def add_file(
    session: Session,
    caller: Caller,
    blob: Blob,
    *,
    filename: str,
    purpose: str,
    expires_after: int | None,
    upload: str | None = None,
) -> File:
    """Write a file's row; its content lies in the object store already, and came with an ``upload`` or whole.

    The project is locked.

    Raises:
        QuotaError: beyond the project's bytes.
    """
    now = clock.now()
    quotas.check_storage(session, caller.project_id, caller.limits, blob.bytes, upload=upload)
    if expires_after is None and purpose == "batch":
        expires_after = BATCH_SECONDS
    row = File(
        id=ids.new("file"),
        project_id=caller.project_id,
        filename=filename,
        purpose=purpose,
        bytes=blob.bytes,
        sha256=blob.sha256,
        blob=blob.key,
        status="processed",
        status_details=None,
        created_at=now,
        expires_at=None if expires_after is None else now + expires_after,
        deleted_at=None,
    )
    session.add(row)
    session.flush()
    detail = {"bytes": blob.bytes, "sha256": blob.sha256, "purpose": purpose}
    audit.add(session, caller.principal.key_id, "file.create", row.id, now=now, detail=detail)
    return row


@router.post(
    "/v1/files", response_model=schemas.FileObject, responses=responses(409), openapi_extra=_FORM, status_code=200
)
async def create_file(request: Request, parts: PartsDep, caller: FilesWrite) -> Response:
    """Upload a file."""
    limit = parts.settings.upload_bytes
    form = await multipart.receive(request, file_field="file", limit=limit, folder=parts.settings.home / "incoming")
    with form.file:
        return await to_thread.run_sync(_create, request, parts, caller, form)


def _create(request: Request, parts: Parts, caller: Caller, form: multipart.Form) -> Response:
    purpose, expires_after = _read_fields(form.fields)
    filename = multipart.file_name(form.filename)
    with parts.db.read() as session:
        quotas.check_storage(session, caller.project_id, caller.limits, form.bytes)
    blob = parts.blobs.put(form.file, limit=parts.settings.upload_bytes)
    used = False

    def do() -> schemas.FileObject:
        nonlocal used
        used = True
        row = add_file(session, caller, blob, filename=filename, purpose=purpose, expires_after=expires_after)
        return wire(row)

    try:
        with parts.db.write() as session:
            return once(session, request, caller, [filename, purpose, expires_after, blob.sha256], do)
    except BaseException:
        used = False
        raise
    finally:
        if not used:
            discard(parts, blob.key)


def discard(parts: Parts, key: str, owner: Select[Any] | None = None) -> None:
    """Delete content that no file has, or no row that ``owner`` finds; what one has stays.

    A commit that failed for its client may have been done all the same. A store that is away is looked through later.
    """
    query = select(File.id).where(File.blob == key) if owner is None else owner
    with parts.db.read() as session:
        if session.scalar(query.limit(1)) is not None:
            return
    with contextlib.suppress(StoreAwayError):
        parts.blobs.delete(key)


def _read_fields(fields: dict[str, str]) -> tuple[str, int | None]:
    known = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    for name in fields:
        if name not in known:
            raise invalid(f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
    if "purpose" not in fields:
        raise invalid("Missing required parameter: 'purpose'", "purpose", "missing_required_parameter")
    try:
        purpose = _PURPOSE.validate_python(fields["purpose"])
    except ValidationError as error:
        raise invalid(f"Invalid value for 'purpose': {error.errors()[0]['msg']}", "purpose") from None
    if not fields.keys() & {"expires_after[anchor]", "expires_after[seconds]"}:
        return purpose, None
    seconds = fields.get("expires_after[seconds]", "")
    if fields.get("expires_after[anchor]") != "created_at":
        raise invalid("expires_after[anchor] must be 'created_at'", "expires_after.anchor")
    if not (seconds.isascii() and seconds.isdigit() and len(seconds) < 10 and 3600 <= int(seconds) <= 2_592_000):
        raise invalid("expires_after[seconds] must be between 3600 and 2592000", "expires_after.seconds")
    return purpose, int(seconds)


@router.get("/v1/files", responses=responses())
def list_files(
    parts: PartsDep,
    caller: FilesRead,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    purpose: Annotated[str | None, Query(max_length=40)] = None,
) -> schemas.Page[schemas.FileObject]:
    """List files."""
    within: list[tuple[Any, Any]] = [(File.project_id, caller.project_id)]
    if purpose is not None:
        within.append((File.purpose, schemas.plain_query(purpose)))
    with parts.db.read() as session:
        there = _there(clock.now())
        found = take(session, File, *there, within=within, after=after, limit=limit, order=order)
        return page([wire(row) for row in found.rows], found.more)


def page(items: list[Any], more: bool) -> Any:
    """Return a page with its first and last id."""
    first, last = (items[0].id, items[-1].id) if items else (None, None)
    return schemas.Page(data=items, first_id=first, last_id=last, has_more=more)


@router.get("/v1/files/{file_id}", responses=responses())
def retrieve_file(file_id: str, parts: PartsDep, caller: FilesRead) -> schemas.FileObject:
    """Return what is known of a file."""
    with parts.db.read() as session:
        return wire(get_file(session, caller.project_id, file_id))


@router.delete("/v1/files/{file_id}", responses=responses(409))
def delete_file(file_id: str, parts: PartsDep, caller: FilesWrite) -> schemas.FileDeleted:
    """Delete a file and its content."""
    with parts.db.write() as session:
        hold_project(session, caller)  # as whoever creates a job with the file does
        row = get_file(session, caller.project_id, file_id)
        used = select(Job.id).where(
            Job.status.in_(ACTIVE),
            Job.project_id == caller.project_id,
            or_(Job.training_file == file_id, Job.validation_file == file_id),
        )
        job = session.scalar(used.limit(1))
        if job is not None:
            raise ApiError(
                409,
                f"The file is used by the job {job}, which has not ended; cancel that first",
                param="file_id",
                code="file_in_use",
                headers={"x-should-retry": "false"},
            )
        now = clock.now()
        row.deleted_at, row.filename = now, ""
        key = row.blob
        audit.add(session, caller.principal.key_id, "file.delete", row.id, now=now)
    if key is not None:
        forget(parts, file_id, key)
    return schemas.FileDeleted(id=file_id, deleted=True)


def forget(parts: Parts, file_id: str, key: str) -> None:
    """Delete a deleted file's content. The row keeps the place until it is gone: the dispatcher tries again."""
    with parts.db.read() as session:
        shared = session.scalar(select(File.id).where(File.blob == key, File.deleted_at.is_(None)).limit(1))
    try:
        if shared is None:
            parts.blobs.delete(key)
    except StoreAwayError:
        return
    with parts.db.write() as session:
        row = session.scalar(select(File).where(File.id == file_id))
        if row is not None:
            row.blob = None


@router.get(
    "/v1/files/{file_id}/content",
    response_class=StreamingResponse,
    responses={
        **responses(),
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    },
)
def file_content(file_id: str, parts: PartsDep, caller: FilesRead) -> StreamingResponse:
    """Return a file's content."""
    with parts.db.read() as session:
        row = get_file(session, caller.project_id, file_id)
        key, size, filename = row.blob, row.bytes, row.filename
    if key is None:
        raise not_found("content of File object", file_id)
    try:
        stream = parts.blobs.open(key)
    except BlobError:
        raise not_found("content of File object", file_id) from None

    def chunks() -> Iterator[bytes]:
        with stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    headers = {
        "content-length": str(size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
    }
    return StreamingResponse(chunks(), headers=headers, media_type="application/octet-stream")
