"""How the server is: probes for whoever runs it, numbers for Prometheus."""

from __future__ import annotations

import time

from fastapi import APIRouter, Depends, Request, Response

from ... import __version__
from . import schemas
from .auth import Scope, requires
from .problems import ApiError
from .refusals import refusals

open_to_all = APIRouter(tags=["status"])
asking = APIRouter(dependencies=[Depends(requires(Scope.ASK))], tags=["status"])


@open_to_all.get("/live", responses=refusals())
async def live() -> schemas.State:
    """Whether the process answers at all."""
    return schemas.State(status="alive")


@open_to_all.get("/ready", responses=refusals(503))
async def ready(request: Request) -> schemas.State:
    """Whether a text would be taken: the model's thread works, base and store are as they were
    written, the log can be written."""
    state = request.app.state
    if not state.worker.is_alive:
        raise ApiError(503, "the model's thread does not take texts")
    if not state.base.is_verified:
        raise ApiError(503, "the base or the store is not as it was written")
    if state.log.failed is not None:
        raise ApiError(503, "the provenance log cannot be written", "log_unavailable")
    return schemas.State(status="ready")


@open_to_all.get("/health", responses=refusals())
async def health(request: Request) -> schemas.Health:
    """What is served. `base_hash_verified` is of the last verification, not of this request."""
    state = request.app.state
    base, (waiting, active) = state.base, state.worker.load
    is_alive = state.worker.is_alive
    calibration = base.selector.router.calibration
    return schemas.Health(
        status="damaged" if not base.is_verified else "ok" if is_alive else "not_ready",
        model=state.model_name,
        model_loaded=True,
        base_digest=base.base_digest,
        base_hash_verified=base.is_verified,
        verified_seconds_ago=time.monotonic() - base.verified_at,
        registry_count=len(base.snapshot.beliefs),
        store_revision=base.snapshot.revision,
        routing="calibrated" if base.selector.can_route else "by_name_only",
        calibration_stale=calibration is not None and base.is_stale(calibration.beliefs),
        waiting=waiting,
        active=active,
        version=__version__,
    )


@asking.get(
    "/metrics",
    responses={**refusals(401), 200: {"content": {"text/plain": {}}, "description": "Numbers."}},
    response_class=Response,
)
async def metrics(request: Request) -> Response:
    """In Prometheus' text format."""
    state = request.app.state
    base = state.base
    state.metrics.beliefs.set(len(base.snapshot.beliefs))
    state.metrics.revision.set(base.snapshot.revision)
    state.metrics.verified.set(int(base.is_verified))
    return Response(state.metrics.render(), media_type=state.metrics.content_type)
