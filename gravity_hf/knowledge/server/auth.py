"""Who may do what: bearer tokens in two scopes, and which names the server answers to."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from enum import Enum
from typing import Annotated

from fastapi import Header, Request

from .problems import ApiError
from .settings import ServerSettings, is_loopback

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Scope(Enum):
    """What a request wants: answers, or changes and the log."""

    ASK = "ask"
    ADMIN = "admin"


class Gate:
    """Compares tokens in a time that does not depend on them."""

    def __init__(self, settings: ServerSettings) -> None:
        self._token = _digest(settings.token)
        self._admin = _digest(settings.admin_token)

    def check(self, scope: Scope, authorization: str | None) -> None:
        """Raise unless the header `Authorization` opens the scope.

        The admin token opens both. Where no token is set for asking, any header will do: OpenAI's
        client always sends one.

        Raises:
            ApiError: 401 for no or an unknown token, 403 for one of the other scope.
        """
        if scope is Scope.ASK and self._token is None:
            return
        given = _digest(_bearer(authorization))
        is_admin, is_asking = _same(given, self._admin), _same(given, self._token)
        if is_admin or (scope is Scope.ASK and is_asking):
            return
        if is_asking:
            raise ApiError(403, "this needs the admin token, got the token for asking")
        said = "none" if authorization is None else "another"
        name = "the admin token" if scope is Scope.ADMIN else "a token"
        raise ApiError(
            401, f"expected {name} as Authorization: Bearer TOKEN, got {said}", headers=_CHALLENGE
        )


def requires(scope: Scope) -> Callable[..., None]:
    """A dependency of FastAPI that lets only the scope pass; `app.state.gate` decides."""

    def check(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
        request.app.state.gate.check(scope, authorization)

    return check


def answers_to(settings: ServerSettings) -> frozenset[str] | None:
    """The names in `Host` that are answered; None: all.

    A page elsewhere may let its own name point to 127.0.0.1 and so talk to a server that asks for
    no token: on a loopback address only the names of loopback are answered.
    """
    if not is_loopback(settings.host):
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", settings.host.strip("[]")})


def _bearer(authorization: str | None) -> str | None:
    kind, _, token = (authorization or "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


def _digest(token: str | None) -> bytes | None:
    """Of equal length whatever the token, so that a comparison tells nothing about it."""
    return None if token is None else hashlib.sha256(token.encode()).digest()


def _same(given: bytes | None, own: bytes | None) -> bool:
    if given is None or own is None:
        return False
    return hmac.compare_digest(given, own)
