"""Deltas as adapters: what they are, how much room is left, merging them, and the log."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from ..consolidation import consolidate
from . import schemas
from .auth import Scope, requires
from .beliefs_api import Base, Name, announce, operate
from .knowledge_base import KnowledgeBase
from .problems import ApiError, request_id_of
from .refusals import refusals
from .text_job import category_of

asking = APIRouter(dependencies=[Depends(requires(Scope.ASK))], tags=["deltas"])
admin = APIRouter(dependencies=[Depends(requires(Scope.ADMIN))], tags=["deltas"])


@asking.get("/deltas", responses=refusals(401))
def list_deltas(base: Base) -> schemas.DeltaList:
    """All deltas in short."""
    deltas = [schemas.DeltaSummary(**_summary(b, None)) for b in base.snapshot.beliefs]
    return schemas.DeltaList(count=len(deltas), deltas=deltas)


@asking.get("/deltas/{name:path}", responses=refusals(401, 404, 422, 429, 503, 504))
async def get_delta(name: Name, request: Request, base: Base) -> schemas.DeltaDetail:
    """One delta, and which others share more directions with it than the registry allows."""
    belief = base.snapshot.find(name)
    score, conflicts = await operate(request, lambda: base.neighbours(belief))
    others = len(base.snapshot.beliefs) - 1
    return schemas.DeltaDetail(
        **_summary(belief, score),
        version=belief.version,
        delta_rank=max(belief.delta.rank(module) for module in belief.delta.factors),
        tags=sorted(belief.metadata.get("tags", [])),
        composable_with=others - len(conflicts),
        incompatible_with=conflicts,
    )


@asking.get("/capacity", responses=refusals(401, 422, 429, 503, 504))
async def capacity(request: Request, base: Base) -> schemas.Capacity:
    """Directions of each map that no registered delta uses, in numbers of rank-1 deltas."""
    return schemas.Capacity(**await operate(request, base.capacity))


@admin.post("/consolidate", responses=refusals(400, 401, 403, 404, 409, 422, 429, 503, 504))
async def consolidate_beliefs(
    body: schemas.ConsolidateRequest, request: Request, base: Base
) -> schemas.Consolidated:
    """Merge beliefs into one of less rank, if every fact of theirs is still answered: all or
    nothing. `dry_run` only says what would come of it."""
    details = {"keys": body.keys, "category": body.category}
    if not body.dry_run:
        announce(request, "consolidate", details)
    report = await operate(request, lambda: _consolidated(base, body))
    if not body.dry_run:
        ids = {"request_id": request_id_of(request), "belief_id": report["belief_id"]}
        request.app.state.log.note("consolidated", {**ids, **details})
    return schemas.Consolidated(
        dry_run=body.dry_run,
        report=report,
        registry_count=len(base.snapshot.beliefs),
        revision=base.snapshot.revision,
    )


@admin.get("/provenance", responses=refusals(401, 403, 422))
async def provenance(
    request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> schemas.LogPage:
    """The newest entries of the log."""
    log = request.app.state.log
    return schemas.LogPage(entries=len(log), head=log.head(), log=log.latest(limit))


def _consolidated(base: KnowledgeBase, body: schemas.ConsolidateRequest) -> dict[str, Any]:
    if (body.category is None) == (body.keys is None):
        raise ApiError(422, "expected either a category or keys, got both or neither")
    keys = body.keys
    if keys is None:
        keys = [b.key for b in base.snapshot.beliefs if category_of(b) == body.category]
    keys = sorted({base.snapshot.find(key).key for key in keys})
    if len(keys) < 2:
        raise ApiError(400, f"expected at least two beliefs to merge, got {len(keys)}")

    def merge(store: Any) -> Any:
        return consolidate(
            store, base.registry, keys=keys, energy=body.energy, dry_run=body.dry_run
        )

    return base.change(merge).to_dict()


def _summary(belief: Any, score: float | None) -> dict[str, Any]:
    fact, top1 = belief.fact, belief.metrics.get("top1")
    return {
        "delta_id": belief.id,
        "category": category_of(belief),
        "description": belief.key if fact is None else f"{fact.prompt} {fact.answer}",
        "target_layers": list(belief.delta.factors),
        "param_count": belief.delta.parameters(),
        "orthogonality_score": score,
        "confidence": None if top1 is None else float(top1),
    }
