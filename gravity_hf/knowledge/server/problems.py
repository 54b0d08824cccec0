"""What the server refuses, and how it says so: `{"error": {code, message, request_id}}`.

OpenAI's clients read `error.message`, `error.type` and `error.code`; the same object serves both.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .. import errors

_logger = logging.getLogger(__name__)

# Status -> OpenAI's name for the kind of error.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}
# The first class that fits decides.
_KNOWLEDGE_STATUS = (
    (errors.UnknownKeyError, 404, "unknown_belief"),
    (errors.DuplicateKeyError, 409, "duplicate_belief"),
    (errors.InterferenceError, 409, "interference"),
    (errors.CapacityError, 409, "no_capacity"),
    (errors.IncompatibleBaseError, 409, "incompatible_base"),
    (errors.ValidationError, 422, "invalid_belief"),
    (errors.BudgetError, 422, "over_budget"),
    (errors.QuantizationError, 422, "precision_not_met"),
    (errors.UnsafeFileError, 422, "unsafe_file"),
    (errors.LockTimeoutError, 503, "store_locked"),
)
_HIDDEN = "the server failed on this request; its log says why"


class ApiError(Exception):
    """An answer that is a refusal.

    Args:
        status: of HTTP.
        message: plain; shown to the client.
        code: a word for programs; by default the status' own.
        headers: of the response, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or _CODES.get(status, "error")
        self.headers = headers or {}

    def body(self, request_id: str | None) -> dict[str, Any]:
        """The JSON of the answer."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "code": self.code,
                "message": str(self),
                "type": _TYPES.get(self.status, fallback),
                "param": None,
                "request_id": request_id,
            }
        }


def as_api_error(error: BaseException) -> ApiError:
    """What the client is told of an error. Of one that nobody foresaw: only that there was one."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code in _KNOWLEDGE_STATUS:
        if isinstance(error, kind):
            return ApiError(status, str(error), code)
    _logger.error("request failed", exc_info=error)
    return ApiError(500, _HIDDEN)


def response_of(error: ApiError, request_id: str | None) -> JSONResponse:
    """The refusal as a response."""
    return JSONResponse(error.body(request_id), error.status, error.headers)


def request_id_of(request: Request) -> str | None:
    """The id that the outermost layer gave the request."""
    return request.scope.get("state", {}).get("request_id")


def add_handlers(app: FastAPI) -> None:
    """Let every error of `app` be answered in one form."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return response_of(as_api_error(error), request_id_of(request))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response_of(ApiError(422, _fields(error)), request_id_of(request))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return response_of(
            ApiError(error.status_code, str(error.detail), headers=headers), request_id_of(request)
        )

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(errors.KnowledgeError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, refused)


def _fields(error: RequestValidationError) -> str:
    """Which fields are wrong and how; never what they held, which may be long or secret."""
    said = []
    for fault in error.errors()[:5]:
        place = ".".join(str(part) for part in fault["loc"] if part != "body") or "body"
        said.append(f"{place}: {fault['msg']}")
    more = len(error.errors()) - len(said)
    return "; ".join(said) + (f"; and {more} more" if more > 0 else "")
