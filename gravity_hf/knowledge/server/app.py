"""The application: everything of the server except the socket."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from ... import __version__
from . import answers_api, beliefs_api, openai_api, page, problems, registry_api, status_api
from .auth import Gate, answers_to
from .decoding import Decoder
from .inference import Inference
from .knowledge_base import KnowledgeBase
from .lanes import Caller
from .limits import Limits
from .metrics import Metrics
from .provenance_log import ProvenanceLog
from .settings import ServerSettings
from .text_job import Tools
from .worker import Worker

_logger = logging.getLogger(__name__)
_DESCRIPTION = "Answers of a causal language model, with facts that can be added and taken away."


def create_app(
    base: KnowledgeBase, settings: ServerSettings | None = None, *, model_name: str = "gravity"
) -> FastAPI:
    """The server of one model and its beliefs, as an ASGI application.

    Args:
        base: see `opening.open_knowledge` for one from two folders.
        settings: who may ask, and the bounds. Without an admin token a random one is made; it is
            in `app.state.settings`.
        model_name: what clients call the model.

    Raises:
        ValueError: the address can be reached from elsewhere and a token is missing.
    """
    settings = ServerSettings() if settings is None else settings
    settings.check_bind()
    settings = settings.with_admin_token()
    app = FastAPI(
        title="gravity_hf knowledge server",
        description=_DESCRIPTION,
        version=__version__,
        lifespan=_lifespan(settings),
        # The pages of documentation load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    metrics, log = Metrics(), ProvenanceLog(settings)
    worker = Worker(
        Decoder(Caller(base.model), base.bank.routed, settings.batch_rows),
        active_rows=settings.active_rows,
        queue=settings.queue,
        metrics=metrics,
        before_text=base.refresh,
    )
    state = app.state
    state.settings, state.gate, state.base = settings, Gate(settings), base
    state.metrics, state.log, state.worker = metrics, log, worker
    state.inference = Inference(Tools(base, log, metrics), worker, settings)
    state.model_name, state.started = model_name, int(time.time())
    problems.add_handlers(app)
    for router in (
        answers_api.router,
        beliefs_api.asking,
        beliefs_api.admin,
        registry_api.asking,
        registry_api.admin,
        status_api.open_to_all,
        status_api.asking,
        openai_api.router,
        page.router,
    ):
        app.include_router(router)
    app.add_middleware(
        Limits, settings=settings, hosts=answers_to(settings), observe=metrics.observe
    )
    return app


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def _lifespan(settings: ServerSettings) -> Lifespan:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = app.state
        state.worker.start()
        state.log.note("started", {"base_digest": state.base.base_digest, "version": __version__})
        verifying = asyncio.create_task(_verify_regularly(state.base, settings.verify_every_s))
        try:
            yield
        finally:
            verifying.cancel()
            with suppress(asyncio.CancelledError):
                await verifying
            await run_in_threadpool(state.worker.close, settings.shutdown_timeout_s)
            state.base.close()
            with suppress(problems.ApiError):
                state.log.note("stopped", {"store_revision": state.base.snapshot.revision})

    return lifespan


async def _verify_regularly(base: Any, every_s: float) -> None:
    while every_s:
        await asyncio.sleep(every_s)
        try:
            await run_in_threadpool(base.verify)
        except Exception:
            _logger.exception("the base could not be verified")
