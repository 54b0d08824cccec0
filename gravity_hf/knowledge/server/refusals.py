"""The refusals of an endpoint, for its OpenAPI description."""

from __future__ import annotations

from typing import Any

from .schemas import ErrorBody

_WHY = {
    400: "Something of OpenAI's interface that is not here.",
    401: "No token, or an unknown one.",
    403: "The token for asking where the admin token is needed.",
    404: "No such belief or model.",
    409: "It does not fit what the store has.",
    413: "More than is taken in one request.",
    422: "Fields that are not what they have to be.",
    429: "Too many texts are waiting; Retry-After says when to try again.",
    503: "The server is not ready.",
    504: "The time for the request was over.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route; 400, 408 and 421 of malformed requests are everywhere."""
    malformed = {
        400: "Malformed.",
        408: "The body came too slowly.",
        421: "Another host was meant.",
    }
    return {
        status: {"model": ErrorBody, "description": _WHY.get(status) or malformed[status]}
        for status in sorted({*malformed, *statuses})
    }
