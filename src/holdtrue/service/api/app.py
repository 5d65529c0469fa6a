"""The application: its layers from the outside in, and its routes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer

from holdtrue.service import web
from holdtrue.service.api import admin, chat, errors, files, health, jobs, models, uploads
from holdtrue.service.api.context import Parts
from holdtrue.service.api.edge import Edge
from holdtrue.service.api.gatekeeper import Gatekeeper
from holdtrue.service.api.idempotency import Refusals
from holdtrue.service.api.metrics import Metrics
from holdtrue.service.api.telemetry import instrument
from holdtrue.service.quotas import RateLimiter
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.serving.client import InferenceClient
from holdtrue.serving.port import Inference

_ABOUT = (
    "OpenAI's fine-tuning API, with the provider's policy inside the training loop and a gate before release. "
    "Additions: the job status `paused`, the event type `moderation_checks`, and everything under `/v1/holdtrue`."
)


def create_app(
    settings: ServiceSettings,
    *,
    db: Database | None = None,
    blobs: Blobs | None = None,
    inference: Inference | None = None,
) -> FastAPI:
    """Build the application of one API process.

    Args:
        settings: of the service.
        db, blobs, inference: in the place of those that the settings name.
    """
    db = db or Database(settings.database)
    parts = Parts(
        settings=settings,
        db=db,
        blobs=blobs or Blobs(settings.blobs),
        metrics=Metrics(db),
        rates=RateLimiter(settings.rate_limit_storage),
        inference=inference or InferenceClient(settings.inference_url, settings.inference_secret.get_secret_value()),
    )
    app = FastAPI(
        title="holdtrue",
        version="1",
        description=_ABOUT,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        separate_input_output_schemas=False,
    )
    app.state.parts = parts
    app.state.stopping = lambda: False
    for router in _routers():
        # For the document alone: the gatekeeper has let the caller in before any route is looked for.
        known = [Security(HTTPBearer(auto_error=False))] if router is not health.router else []
        app.include_router(router, dependencies=known)
    web.install(app)
    errors.install(app, web.answer)
    app.add_middleware(Gatekeeper, parts=parts)
    app.add_middleware(Refusals, parts=parts)
    app.add_middleware(Edge, metrics=parts.metrics, upload_bytes=settings.upload_bytes, answer=web.answer)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    instrument(app)
    return app


def _routers() -> list[APIRouter]:
    return [health.router, files.router, uploads.router, jobs.router, models.router, chat.router, admin.router]


def _document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document: FastAPI's, without the 422 that is never answered here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation.get("responses", {}).pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
