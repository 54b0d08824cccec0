"""Listens: uvicorn with bounds on connections, and a graceful end."""

from __future__ import annotations

import uvicorn

from .app import create_app
from .connections import bounded_protocol
from .knowledge_base import KnowledgeBase
from .settings import ServerSettings

# Headers of one request, in bytes.
_MOST_HEADERS = 32_768


def make_server(
    base: KnowledgeBase, settings: ServerSettings, *, model_name: str = "gravity"
) -> uvicorn.Server:
    """A server that `run()` starts, until SIGINT or SIGTERM, or until `should_exit` is set.

    Raises:
        ValueError: see `create_app`.
    """
    app = create_app(base, settings, model_name=model_name)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded_protocol(settings.header_timeout_s),
        ws="none",
        lifespan="on",
        # Requests are counted in /metrics; their texts are nobody's business.
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        h11_max_incomplete_event_size=_MOST_HEADERS,
        timeout_keep_alive=max(1, round(settings.header_timeout_s)),
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
    )
    return uvicorn.Server(config)


def serve(base: KnowledgeBase, settings: ServerSettings, *, model_name: str = "gravity") -> None:
    """Serve until the process is told to stop. Raises as `make_server`."""
    make_server(base, settings, model_name=model_name).run()
