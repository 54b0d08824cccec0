"""OpenAI's `/v1/models`, `/v1/completions` and `/v1/chat/completions`.

Existing clients work as they are. Beyond OpenAI's fields: `beliefs` (keys or ids) and
`use_knowledge` in a request, `provenance` in every choice of the answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import JSONResponse, Response

from .answers_api import Service, provenance_of_answer, usage_of
from .auth import Scope, requires
from .inference import Inference, Ticket
from .openai_prompts import chat_prompt, check_supported, choices_of
from .openai_schemas import ChatRequest, CompletionRequest
from .problems import ApiError, request_id_of
from .refusals import refusals
from .streaming import DONE, EventStream, event, primed
from .text_job import Answer, Wanted

router = APIRouter(prefix="/v1", dependencies=[Depends(requires(Scope.ASK))], tags=["openai"])
_REFUSALS = refusals(400, 401, 404, 413, 422, 429, 503, 504)
# OpenAI knows two reasons; that nothing was written is told by `provenance`, too.
_REASONS = {"stop": "stop", "length": "length", "abstained": "content_filter"}


@router.get("/models", responses=refusals(401))
async def list_models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(request)]}


@router.get("/models/{model:path}", responses=refusals(401, 404, 422))
async def get_model(
    model: Annotated[str, Path(min_length=1, max_length=1000)], request: Request
) -> dict[str, Any]:
    """That model by its name."""
    _check_model(request, model)
    return _model(request)


@router.post("/completions", responses=_REFUSALS, response_class=JSONResponse, response_model=None)
async def completions(body: CompletionRequest, request: Request, service: Service) -> Response:
    """Continue texts."""
    check_supported(body)
    _check_model(request, body.model)
    wanted = choices_of(service, body, request_id_of(request) or "")
    shape = _Shape(request, "text_completion", "cmpl", chat=False)
    return await _respond(body, request, service, wanted, shape)


@router.post(
    "/chat/completions", responses=_REFUSALS, response_class=JSONResponse, response_model=None
)
async def chat_completions(body: ChatRequest, request: Request, service: Service) -> Response:
    """Answer the last message of a chat; beliefs are looked up by the last one of the user."""
    check_supported(body)
    _check_model(request, body.model)
    wanted = chat_prompt(service, body, request_id_of(request) or "")
    shape = _Shape(request, "chat.completion", "chatcmpl", chat=True)
    return await _respond(body, request, service, wanted, shape)


class _Shape:
    """How the objects of one response look."""

    def __init__(self, request: Request, name: str, prefix: str, *, chat: bool) -> None:
        self._chat, self._name = chat, name
        self._head = {
            "id": f"{prefix}-{request_id_of(request)}",
            "created": int(time.time()),
            "model": request.app.state.model_name,
            "system_fingerprint": request.app.state.base.base_digest[:16],
        }

    def whole(self, answers: list[Answer], prompts: int) -> dict[str, Any]:
        """The response to a request that does not stream."""
        choices = []
        for index, answer in enumerate(answers):
            choice: dict[str, Any] = {"index": index, "logprobs": None, **_end(answer)}
            if self._chat:
                choice["message"] = {
                    "role": "assistant", "content": answer.text, "refusal": None
                }  # fmt: skip
            else:
                choice["text"] = answer.text
            choices.append(choice)
        usage = usage_of(answers, prompts).model_dump()
        return {**self._head, "object": self._name, "choices": choices, "usage": usage}

    def piece(self, index: int, text: str | None, answer: Answer | None = None) -> dict[str, Any]:
        """A piece of text, or with `answer` the end of one; text None begins a chat's message."""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": None}
        if not self._chat:
            choice["text"] = text or ""
        elif answer is not None:
            choice["delta"] = {}
        else:
            choice["delta"] = {"content": text or ""}
            if text is None:
                choice["delta"]["role"] = "assistant"
        if answer is not None:
            choice.update(_end(answer))
        return self._chunk([choice])

    def usage(self, answers: list[Answer], prompts: int) -> dict[str, Any]:
        """The last piece, where the client asked for the usage."""
        return {**self._chunk([]), "usage": usage_of(answers, prompts).model_dump()}

    def begin(self, count: int) -> list[dict[str, Any]]:
        """What comes before any text."""
        return [self.piece(i, None) for i in range(count)] if self._chat else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"{self._name}.chunk" if self._chat else self._name
        return {**self._head, "object": name, "choices": choices}


async def _respond(
    body: Any, request: Request, service: Inference, wanted: list[Wanted], shape: _Shape
) -> Response:
    # Each prompt is counted once, however many choices it has.
    prompts = sum(len(one.prompt_ids) for one in wanted[:: body.n or 1])
    ticket = service.submit(wanted)
    if not body.stream:
        answers = await ticket.answers(request)
        return JSONResponse(shape.whole(answers, prompts))
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    pieces = await primed(_pieces(ticket, shape, with_usage, prompts), ticket, request)
    return EventStream(ticket, pieces, request_id_of(request) or "")


async def _pieces(
    ticket: Ticket, shape: _Shape, with_usage: bool, prompts: int
) -> AsyncIterator[bytes]:
    begun, answers = False, []
    async for index, heard in ticket.events():
        # Only now: a refusal before the first token has a status of its own.
        if not begun:
            begun = True
            for piece in shape.begin(len(ticket.jobs)):
                yield event(piece)
        if isinstance(heard, Answer):
            answers.append(heard)
            yield event(shape.piece(index, "", heard))
        else:
            yield event(shape.piece(index, heard.text))
    if with_usage:
        yield event(shape.usage(answers, prompts))
    yield DONE


def _end(answer: Answer) -> dict[str, Any]:
    return {
        "finish_reason": _REASONS[answer.finish_reason],
        "provenance": provenance_of_answer(answer).model_dump(),
    }


def _model(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.started,
        "owned_by": "gravity_hf",
    }


def _check_model(request: Request, name: str | None) -> None:
    own = request.app.state.model_name
    if name not in (None, "", own):
        raise ApiError(404, f"expected the model {own!r}, got {name!r:.100}", "model_not_found")
