"""Connections that send their headers too slowly are closed."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def bounded_protocol(header_timeout_s: float) -> type[H11Protocol]:
    """uvicorn's protocol for `http=`: a request's headers have to be whole within the time.

    uvicorn bounds the pause between two requests of a connection, not how long one takes to
    arrive: a client that sends one byte a minute would hold its connection for ever.
    """

    class BoundedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self._watch()
            else:
                self._stop()

        def _watch(self) -> None:
            # Not started anew by each byte: the whole of the headers has this time.
            if self._timer is None:
                self._timer = self.loop.call_later(header_timeout_s, self._give_up)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return BoundedProtocol
