"""/healthz, /readyz and /metrics: for machines that watch the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from sqlalchemy import select

from holdtrue.service import auth, clock
from holdtrue.service.api.context import Parts, PartsDep
from holdtrue.service.api.errors import ApiError, ErrorBody
from holdtrue.service.store.schema import Organization
from holdtrue.serving.loopback import is_loopback

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """That the process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether the service can work, and what of it cannot."""

    status: Literal["ok", "failing"]
    database: bool
    objects: bool
    counts: bool


@router.get("/healthz")
def health() -> Health:
    """Whether this process is alive; it asks nobody else."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
def ready(parts: PartsDep) -> Readiness:
    """Whether database, object store and the store of counts can be reached; 503 where one cannot."""
    found = Readiness(
        status="ok",
        database=_answers(lambda: _database(parts)),
        objects=_answers(parts.blobs.check),
        counts=_answers(parts.rates.check),
    )
    if found.database and found.objects and found.counts:
        return found
    return JSONResponse({**found.model_dump(), "status": "failing"}, 503)  # type: ignore[return-value]


def _database(parts: Parts) -> None:
    with parts.db.read() as session:
        session.scalars(select(Organization.id).limit(1)).one()


def _answers(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception:
        return False
    return True


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        401: {"model": ErrorBody},
    },
)
def metrics(request: Request, parts: PartsDep) -> Response:
    """Figures in Prometheus's form. Beyond a loopback address they need a provider's key."""
    if not is_loopback(parts.settings.host) or parts.settings.behind_tls:
        _, _, secret = request.headers.get("authorization", "").partition(" ")
        with parts.db.read() as session:
            found = auth.find(session, secret.strip(), clock.now())
        if found is None or found.principal.role != "provider":
            raise ApiError(401, "The metrics need a provider's key", headers={"www-authenticate": "Bearer"})
    return Response(parts.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")
