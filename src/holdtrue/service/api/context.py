"""What a request's handler works with: the application's parts, and who asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from holdtrue.service import auth, clock, quotas
from holdtrue.service.api.errors import ApiError, no_valid_key
from holdtrue.service.api.metrics import Metrics
from holdtrue.service.auth import Principal, Scope
from holdtrue.service.quotas import Limits, RateLimiter
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import ApiKey
from holdtrue.serving.port import Inference


@dataclass(frozen=True)
class Parts:
    """What an application is made of; one for each process."""

    settings: ServiceSettings
    db: Database
    blobs: Blobs
    metrics: Metrics
    rates: RateLimiter
    inference: Inference


@dataclass(frozen=True)
class Caller:
    """Who asks, and what their project may use."""

    principal: Principal
    limits: Limits
    request_id: str

    @property
    def project_id(self) -> str:
        """The tenant: everything that a request touches is looked up with it."""
        return self.principal.project_id


def parts_of(request: Request) -> Parts:
    """Return the application's parts."""
    return request.app.state.parts


def caller_of(request: Request, scope: Scope) -> Caller:
    """Return who asks; 403 when the key lacks the scope."""
    principal: Principal = request.state.principal
    if not principal.may(scope):
        raise ApiError(
            403,
            f"This API key may not do that: it lacks the scope '{scope}'. Use another key, or have one made",
            code="missing_scope",
        )
    return Caller(principal, request.state.limits, request.state.request_id)


def hold_project(session: Session, caller: Caller, *others: str) -> None:
    """Lock the caller's project, and others beside it, and look again whether their key still works.

    A request may outlive its key by minutes. Who erases a project locks it too, and revokes its keys: what comes after
    that leaves nothing in it.

    Raises:
        ApiError: the key was revoked or has expired meanwhile.
    """
    for project_id in sorted({caller.project_id, *others}):
        quotas.lock_project(session, project_id)
    key = session.get(ApiKey, caller.principal.key_id)
    if key is None or not auth.is_valid(key, clock.now()):
        raise no_valid_key("Your API key was revoked or has expired during the request, and nothing was done")


class Needs:
    """A dependency that names the scope of a route; every route under /v1 has one, and a test looks."""

    def __init__(self, scope: Scope) -> None:
        self.scope: Scope = scope

    def __call__(self, request: Request) -> Caller:
        return caller_of(request, self.scope)


def provider(request: Request) -> Caller:
    """A dependency: the provider's own keys only. To all others the route is not there."""
    caller = caller_of(request, "admin")
    if caller.principal.role != "provider":
        raise ApiError(404, "Invalid URL: there is nothing at this path", code="unknown_url")
    return caller


PartsDep = Annotated[Parts, Depends(parts_of)]
FilesRead = Annotated[Caller, Depends(Needs("files.read"))]
FilesWrite = Annotated[Caller, Depends(Needs("files.write"))]
JobsRead = Annotated[Caller, Depends(Needs("fine_tuning.read"))]
JobsWrite = Annotated[Caller, Depends(Needs("fine_tuning.write"))]
ModelsRead = Annotated[Caller, Depends(Needs("models.read"))]
ModelsWrite = Annotated[Caller, Depends(Needs("models.write"))]
Chat = Annotated[Caller, Depends(Needs("chat"))]
Admin = Annotated[Caller, Depends(Needs("admin"))]
Provider = Annotated[Caller, Depends(provider)]
