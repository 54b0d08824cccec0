"""From what a client wants to what the worker writes, and back."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import Request

from .problems import ApiError
from .settings import ServerSettings
from .text_job import Answer, Emit, Event, Piece, TextJob, Tools, Wanted
from .worker import Worker

# What the HTTP side waits beyond the time limit for a worker that is inside a forward pass.
_GRACE = 0.25


class Inference:
    """Takes what clients want to the worker.

    Args:
        tools: model, beliefs, log, metrics.
        worker: writes.
        settings: bounds.
    """

    def __init__(self, tools: Tools, worker: Worker, settings: ServerSettings) -> None:
        self.tools, self.base, self.worker, self.settings = tools, tools.base, worker, settings
        base = tools.base
        # The worker's thread uses the other one: a tokenizer is not made for two at once.
        self.tokenizer = copy.deepcopy(base.tokenizer)
        config = base.model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None)

    def encode(self, prompt: str, *, special: bool = True) -> tuple[int, ...]:
        """Tokens of a prompt.

        Raises:
            ApiError: 413, too many characters; 422, no token comes out of it.
        """
        if len(prompt) > self.settings.max_prompt_chars:
            raise ApiError(
                413,
                f"expected a prompt of at most {self.settings.max_prompt_chars} characters, got "
                f"{len(prompt)}",
            )
        ids = tuple(self.tokenizer(prompt, add_special_tokens=special)["input_ids"])
        if not ids:
            raise ApiError(422, "expected a prompt of at least one token, got none")
        return ids

    def check(self, wanted: Wanted) -> None:
        """Raise unless a text is within the bounds.

        Raises:
            ApiError: 422 or 413, saying which bound.
        """
        settings, count = self.settings, len(wanted.prompt_ids)
        if count > settings.max_prompt_tokens:
            raise ApiError(
                413, f"expected a prompt of at most {settings.max_prompt_tokens} tokens, got "
                f"{count}",
            )  # fmt: skip
        if wanted.max_new_tokens > settings.max_new_tokens:
            raise ApiError(
                422, f"expected at most {settings.max_new_tokens} new tokens, got "
                f"{wanted.max_new_tokens}",
            )  # fmt: skip
        if self.context is not None and count + wanted.max_new_tokens > self.context:
            raise ApiError(
                422, f"expected prompt and new tokens within the model's {self.context}, got "
                f"{count} and {wanted.max_new_tokens}", "context_length_exceeded",
            )  # fmt: skip
        named = len(wanted.beliefs or ())
        if named > settings.max_beliefs:
            raise ApiError(422, f"expected at most {settings.max_beliefs} beliefs, got {named}")
        if named and not wanted.use_knowledge:
            raise ApiError(422, "beliefs: expected none where use_knowledge is false, got some")
        for name in wanted.beliefs or ():
            self.base.snapshot.find(name)
        if wanted.min_confidence is not None and self.base.selector.confidence is None:
            raise ApiError(
                409,
                "min_confidence: expected a calibrated confidence, the server has none. Start it "
                "with --calibrate, or leave min_confidence out",
                "not_calibrated",
            )

    def submit(self, wanted: Sequence[Wanted]) -> Ticket:
        """Put texts into the queue, all or none. Call it in the event loop.

        Raises:
            ApiError: a bound is passed; 429, the queue is full; 503, closing or the base changed.
        """
        if not self.base.is_verified:
            raise ApiError(503, "the base or the store is not as it was written")
        for one in wanted:
            self.check(one)
        deadline = time.monotonic() + self.settings.timeout_s
        ticket = Ticket(self, deadline)
        jobs = [
            TextJob(self.tools, one, deadline, ticket.emitter(i)) for i, one in enumerate(wanted)
        ]
        self.worker.submit(jobs)
        ticket.jobs = jobs
        return ticket


class Ticket:
    """What a request waits for: the events of its texts, in the event loop."""

    def __init__(self, service: Inference, deadline: float) -> None:
        self._service, self._deadline = service, deadline
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs: list[TextJob] = []

    def emitter(self, index: int) -> Emit:
        """For the text `index`: puts its events here, from the worker's thread."""

        def emit(event: Event) -> None:
            # Of a loop that has ended nobody waits any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return emit

    def cancel(self) -> None:
        """Free what is still being written."""
        for job in self.jobs:
            job.is_cancelled = True
        self._service.worker.wake()

    async def events(self) -> AsyncIterator[tuple[int, Piece | Answer]]:
        """`(text, event)` until all texts are whole.

        Raises:
            ApiError: of the first text that fails, or 504.
        """
        missing = len(self.jobs)
        while missing:
            left = self._deadline + _GRACE - time.monotonic()
            try:
                index, event = await asyncio.wait_for(self._events.get(), max(left, 0.001))
            except (TimeoutError, asyncio.TimeoutError):  # noqa: UP041 - two classes until 3.11
                raise ApiError(504, "the time for this request was over") from None
            if isinstance(event, ApiError):
                raise event
            missing -= isinstance(event, Answer)
            yield index, event

    async def answers(self, request: Request) -> list[Answer]:
        """All texts, whole. A client that leaves frees them.

        Raises:
            ApiError: see `events`.
        """
        try:
            async with self.watching(request):
                found = {i: event async for i, event in self.events() if isinstance(event, Answer)}
        finally:
            self.cancel()
        return [found[i] for i in range(len(self.jobs))]

    @asynccontextmanager
    async def watching(self, request: Request) -> AsyncIterator[None]:
        """Inside, a client that leaves frees its texts; a running response sees that itself."""
        watcher = asyncio.ensure_future(self._cancel_when_left(request))
        try:
            yield
        finally:
            watcher.cancel()

    async def _cancel_when_left(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancel()
