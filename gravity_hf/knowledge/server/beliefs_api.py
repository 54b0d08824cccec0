"""Beliefs: look at them with a token for asking, change them with the admin token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request

from . import schemas
from .auth import Scope, requires
from .knowledge_base import KnowledgeBase
from .problems import ApiError, request_id_of
from .refusals import refusals
from .text_job import category_of
from .worker import Operation

asking = APIRouter(dependencies=[Depends(requires(Scope.ASK))], tags=["beliefs"])
admin = APIRouter(dependencies=[Depends(requires(Scope.ADMIN))], tags=["beliefs"])

# A key may have slashes in it.
Name = Annotated[str, Path(min_length=1, max_length=200, description="Key or id of a belief.")]


def base_of(request: Request) -> KnowledgeBase:
    """Model and beliefs."""
    return request.app.state.base


Base = Annotated[KnowledgeBase, Depends(base_of)]


async def operate(request: Request, action: Callable[[], Any]) -> Any:
    """Let the model's thread do something between texts, and wait for it.

    Once begun it runs to its end: the outcome is told, however long it takes.

    Raises:
        ApiError: 429, the queue is full; 504, its turn did not come in time: nothing was done.
        KnowledgeError: of the action.
    """
    settings = request.app.state.settings
    operation = Operation(action, time.monotonic() + settings.mutation_timeout_s)
    request.app.state.worker.operate(operation)
    future = asyncio.wrap_future(operation.future)
    done, _ = await asyncio.wait([future], timeout=settings.mutation_timeout_s)
    # Cancelling succeeds only as long as it is not begun.
    if not done and operation.future.cancel():
        raise ApiError(504, "its turn did not come in time; nothing was changed")
    return await future


@asking.get("/beliefs", responses=refusals(401, 422))
def list_beliefs(
    base: Base,
    category: Annotated[str | None, Query(max_length=200)] = None,
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> schemas.BeliefList:
    """The active beliefs, sorted by key; `count` is that of all in the category."""
    snapshot = base.snapshot
    chosen = [b for b in snapshot.beliefs if category in (None, category_of(b))]
    return schemas.BeliefList(
        count=len(chosen),
        revision=snapshot.revision,
        beliefs=[belief_out(belief) for belief in chosen[offset : offset + limit]],
    )


@asking.get("/beliefs/{name:path}", responses=refusals(401, 404, 422))
def get_belief(name: Name, base: Base) -> schemas.BeliefOut:
    """One belief."""
    return belief_out(base.snapshot.find(name))


@admin.post("/beliefs", status_code=201, responses=refusals(401, 403, 409, 422, 429, 503, 504))
async def add_belief(body: schemas.BeliefIn, request: Request, base: Base) -> schemas.BeliefOut:
    """Encode a fact and keep it under a new key."""
    fact = body.model_dump()
    for name in ("aliases", "paraphrases", "unrelated"):
        fact[name] = tuple(fact[name])
    announce(request, "add", {"key": body.key})
    belief = await operate(request, lambda: base.add(fact))
    _note(request, "belief_added", belief)
    return belief_out(belief)


@admin.patch("/beliefs/{name:path}", responses=refusals(401, 403, 404, 409, 422, 429, 503, 504))
async def update_belief(
    name: Name, body: schemas.BeliefPatch, request: Request, base: Base
) -> schemas.BeliefOut:
    """Encode another answer: the next version of the key, with an id of its own."""

    def update() -> Any:
        return base.update(base.snapshot.find(name).key, body.answer, body.source)

    announce(request, "update", {"name": name})
    belief = await operate(request, update)
    _note(request, "belief_updated", belief)
    return belief_out(belief)


@admin.delete("/beliefs/{name:path}", responses=refusals(401, 403, 404, 422, 429, 503, 504))
async def remove_belief(
    name: Name,
    request: Request,
    base: Base,
    purge: Annotated[bool, Query(description="Delete its files too: no rollback.")] = False,
) -> schemas.Removed:
    """Take a belief out. Its files stay for a rollback unless they are purged."""

    def remove() -> Any:
        belief = base.snapshot.find(name)
        base.remove(belief.key, purge)
        return belief

    announce(request, "remove", {"name": name, "purge": purge})
    belief = await operate(request, remove)
    _note(request, "belief_removed", belief, purged=purge)
    return schemas.Removed(
        id=belief.id, key=belief.key, purged=purge, revision=base.snapshot.revision
    )


def belief_out(belief: Any) -> schemas.BeliefOut:
    """A belief as clients see it."""
    fact = belief.fact
    return schemas.BeliefOut(
        id=belief.id,
        key=belief.key,
        version=belief.version,
        category=category_of(belief),
        prompt=None if fact is None else fact.prompt,
        answer=None if fact is None else fact.answer,
        aliases=[] if fact is None else list(fact.aliases),
        paraphrases=[] if fact is None else list(fact.paraphrases),
        source="" if fact is None else fact.source,
        target_layers=list(belief.delta.factors),
        parameters=belief.delta.parameters(),
        report=dict(belief.report or {}),
    )


def announce(request: Request, what: str, details: dict[str, Any]) -> None:
    """Note in the log that a change is asked for: where it cannot be written, nothing changes.

    Raises:
        ApiError: 503, see `ProvenanceLog.note`.
    """
    ids = {"request_id": request_id_of(request), "what": what}
    request.app.state.log.note("change_requested", {**ids, **details})


def _note(request: Request, what: str, belief: Any, **more: Any) -> None:
    request.app.state.log.note(
        what,
        {
            "request_id": request_id_of(request),
            "id": belief.id,
            "key": belief.key,
            "version": belief.version,
            "store_revision": request.app.state.base.snapshot.revision,
            **more,
        },
    )
