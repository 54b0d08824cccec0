"""Server-sent events: pieces of an answer as they are written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .inference import Ticket
from .problems import ApiError

DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One event with JSON."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Events of a ticket; whatever ends the response frees the ticket's texts.

    Args:
        ticket: of the texts.
        content: bytes of the events. A refusal (`ApiError`) inside becomes the last event, since
            the status is sent already.
        request_id: told in such an event.
    """

    def __init__(self, ticket: Ticket, content: AsyncIterator[bytes], request_id: str) -> None:
        self._ticket = ticket
        super().__init__(
            _with_errors(content, request_id),
            media_type="text/event-stream",
            # A proxy that collects the answer would make waiting of it.
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()


async def _with_errors(content: AsyncIterator[bytes], request_id: str) -> AsyncIterator[bytes]:
    try:
        async for piece in content:
            yield piece
    except ApiError as error:
        yield event(error.body(request_id))


async def primed(
    content: AsyncIterator[bytes], ticket: Ticket, request: Request
) -> AsyncIterator[bytes]:
    """`content` once its first piece is there: what fails before it still has a status of its own.

    Raises:
        ApiError: of the first piece; the ticket's texts are freed.
    """
    try:
        async with ticket.watching(request):
            first = await anext(content, None)
    except BaseException:
        ticket.cancel()
        raise

    async def whole() -> AsyncIterator[bytes]:
        if first is not None:
            yield first
        async for piece in content:
            yield piece

    return whole()
