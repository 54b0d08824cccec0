"""`/infer` and `/infer/base`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from ..provenance_record import Provenance as Found
from . import schemas
from .auth import Scope, requires
from .inference import Inference
from .problems import request_id_of
from .refusals import refusals
from .sampling import Sampling
from .text_job import Answer, Wanted

router = APIRouter(dependencies=[Depends(requires(Scope.ASK))], tags=["answers"])


def inference_of(request: Request) -> Inference:
    """What takes texts to the model."""
    return request.app.state.inference


Service = Annotated[Inference, Depends(inference_of)]


@router.post("/infer", responses=refusals(401, 404, 409, 413, 422, 429, 503, 504))
async def infer(
    body: schemas.InferRequest, request: Request, service: Service
) -> schemas.InferResponse:
    """Continue a prompt with the beliefs that it is about, with those named, or with none."""
    beliefs = None if body.beliefs is None else tuple(body.beliefs)
    return await _answer(
        body, request, service, use_knowledge=body.use_knowledge, beliefs=beliefs,
        min_confidence=body.min_confidence,
    )  # fmt: skip


@router.post("/infer/base", responses=refusals(401, 413, 422, 429, 503, 504))
async def infer_base(
    body: schemas.BaseInferRequest, request: Request, service: Service
) -> schemas.InferResponse:
    """Continue a prompt with the base model alone."""
    return await _answer(body, request, service, use_knowledge=False)


async def _answer(body: Any, request: Request, service: Inference, **how: Any) -> Any:
    wanted = Wanted(
        request_id=request_id_of(request) or "",
        prompt=body.prompt,
        query=body.prompt,
        prompt_ids=service.encode(body.prompt),
        max_new_tokens=body.max_new_tokens,
        sampling=Sampling(body.temperature, body.top_p, body.top_k, body.seed),
        **how,
    )
    (answer,) = await service.submit([wanted]).answers(request)
    return schemas.InferResponse(
        text=answer.text,
        finish_reason=answer.finish_reason,
        usage=usage_of([answer]),
        provenance=provenance_of_answer(answer),
        layers=list(answer.layers),
        base_only=not (answer.provenance and answer.provenance.sources),
        latency_ms=1000 * answer.seconds,
        base_digest=service.base.base_digest,
        store_revision=answer.revision,
        request_id=wanted.request_id,
    )


def usage_of(answers: list[Answer], prompts: int | None = None) -> schemas.Usage:
    """Tokens of a request; `prompts`: its prompt tokens where several texts share a prompt."""
    read = sum(a.prompt_tokens for a in answers) if prompts is None else prompts
    written = sum(answer.completion_tokens for answer in answers)
    return schemas.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def provenance_of_answer(answer: Answer) -> schemas.Provenance:
    """What the client is told of an answer's origin. Of one without knowledge: nothing vouches."""
    found: Found | None = answer.provenance
    if found is None:
        return schemas.Provenance(
            confidence=None, uncertain=True, stale=False, components={}, sources=[]
        )
    effects = found.per_token[0].sources if found.per_token else ()
    moved = {effect.id: effect.kl for effect in effects}
    return schemas.Provenance(
        confidence=found.confidence if found.calibrated else None,
        uncertain=found.uncertain,
        stale=found.stale,
        components=found.components,
        sources=[
            schemas.Source(
                id=source.id,
                key=source.key,
                version=source.version,
                category=answer.categories[source.id],
                score=source.score,
                effect=_finite(moved.get(source.id)),
            )
            for source in found.sources
        ],
    )


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a token that is impossible without a belief is a very far one."""
    return None if value is None else min(value, 1e9)
