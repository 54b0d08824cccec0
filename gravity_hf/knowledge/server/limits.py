"""The outermost layer: bounds on what a client may send and on how long it may take.

It gives each request an id, reads the whole body before anything else sees the request, and sets
the headers that every response carries.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio

from .problems import ApiError, response_of
from .settings import ServerSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Disconnected(Exception):
    """The client left, or takes its answer too slowly."""


class Limits:
    """ASGI middleware around the application.

    Args:
        app: what answers.
        settings: the bounds.
        hosts: names in `Host` that are answered; None: all.
        observe: told of each response: method, route, status, seconds.
    """

    def __init__(
        self,
        app: Any,
        settings: ServerSettings,
        hosts: frozenset[str] | None,
        observe: Callable[[str, str, int, float], None],
    ) -> None:
        self._app, self._settings, self._hosts, self._observe = app, settings, hosts, observe

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = anyio.current_time(), 0

        async def bounded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    *_HEADERS,
                    (b"x-request-id", request_id.encode()),
                ]
            await self._send(send, message)

        try:
            self._check_host(headers)
            body = await self._body(headers, receive)
            await self._app(scope, _replayed(body, receive), bounded_send)
        except ApiError as error:
            await response_of(error, request_id)(scope, receive, bounded_send)
        except Disconnected:
            status = status or 499
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._observe(scope["method"], route, status or 500, anyio.current_time() - started)

    async def _send(self, send: Send, message: Message) -> None:
        with anyio.move_on_after(self._settings.send_timeout_s) as timer:
            await send(message)
        if timer.cancelled_caught:
            raise Disconnected

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        name = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and name not in self._hosts:
            raise ApiError(
                421, f"expected a Host among {', '.join(sorted(self._hosts))}, got another",
                "wrong_host",
            )  # fmt: skip

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most = self._settings.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            raise _too_large(most)
        body = bytearray()
        with anyio.move_on_after(self._settings.body_timeout_s) as timer:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > most:
                    raise _too_large(most)
                if not message.get("more_body", False):
                    break
        if timer.cancelled_caught:
            raise ApiError(
                408,
                f"expected the body within {self._settings.body_timeout_s:g} s, got "
                f"{len(body)} bytes of it",
                headers={"Connection": "close"},
            )
        return bytes(body)


def _too_large(most: int) -> ApiError:
    # What is still on its way would be read as the next request.
    return ApiError(
        413, f"expected a body of at most {most} bytes, got more", headers={"Connection": "close"}
    )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body in one piece, later the client's leaving."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own where it sent a plain one: it finds it in the log again."""
    wanted = headers.get(b"x-request-id", b"")
    return wanted.decode() if _ID.fullmatch(wanted) else uuid.uuid4().hex


def _host_name(host: str) -> str:
    """Without the port; of an IPv6 address without the brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
