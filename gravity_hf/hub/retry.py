"""Asking the Hub again when it is worth it, and saying plainly when it is not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

# Not transformers' logger, which the command line silences: what is said here is for the user.
logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TRIES = 5
FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
# A limit that lasts longer is for the user to know about, not to sit through.
LONGEST_RETRY_AFTER = 300.0

_TOO_MANY = 429
_CONFLICTS = (409, 412)


def with_retries(what: str, call: Callable[[], Result]) -> Result:
    """`call()`, again after 429, 5xx and cut connections, with longer and longer waits.

    Only for requests that may be sent twice. `what`: the work in words, for notices and errors.

    Raises:
        PermissionError: 401, 403. ConnectionError: still failing after `TRIES` tries, or offline.
        HfHubHTTPError: any other answer.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except Exception as error:
            if attempt == TRIES or not is_passing(error):
                give_up(what, error)
            pause(what, error, attempt)


def is_passing(error: BaseException) -> bool:
    """Whether asking again may help: a rate limit, a fault of the server, a cut connection."""
    status = status_of(error)
    if status == _TOO_MANY:
        return (wait_asked_for(error) or 0.0) <= LONGEST_RETRY_AFTER
    return is_unsure(error)


def is_conflict(error: BaseException) -> bool:
    """Whether the Hub says that the branch is no longer where the commit starts from."""
    return status_of(error) in _CONFLICTS


def is_unsure(error: BaseException) -> bool:
    """Whether the request may have been served although it failed."""
    status = status_of(error)
    return is_cut(error) if status is None else status >= 500


def is_cut(error: BaseException) -> bool:
    """Whether a connection failed, so that nobody knows whether the request was served."""
    # huggingface_hub's HTTP client has changed its name; its errors have kept theirs.
    return not any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error)) and any(
        isinstance(e, (ConnectionError, TimeoutError))
        or any(base.__name__ == "TransportError" for base in type(e).__mro__)
        for e in _chain(error)
    )


def pause(what: str, error: BaseException, attempt: int) -> None:
    """Wait before try number `attempt + 1`, and say so."""
    seconds = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))
    if status_of(error) == _TOO_MANY:
        seconds = max(seconds, wait_asked_for(error) or 0.0)
    logger.warning(
        f"{what}: {_in_short(error)}; trying again in {seconds:g} s ({attempt} of {TRIES - 1})"
    )
    time.sleep(seconds)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for; None where there was no answer."""
    found = _answer(error)
    return None if found is None else found.response.status_code


def wait_asked_for(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait: Retry-After, a number or a date, or else the end of the
    window that RateLimit gives; None where it does not say."""
    found = _answer(error)
    if found is None:
        return None
    headers = found.response.headers
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        limit = parse_ratelimit_headers(headers)
        return None if limit is None else float(limit.reset_in_seconds)
    # A date without a zone is in UTC.
    moment = moment.replace(tzinfo=moment.tzinfo or UTC)
    return float(max(0, math.ceil((moment - datetime.now(UTC)).total_seconds())))


def explained(what: str, error: Exception) -> Exception:
    """The error in the words of somebody who pushes a model, with what to do."""
    status = status_of(error)
    if any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error)):
        return ConnectionError(
            f"{what}: expected to reach the Hub, offline mode is on. Unset HF_HUB_OFFLINE"
        )
    if status in (401, 403) or any(isinstance(e, LocalTokenNotFoundError) for e in _chain(error)):
        return PermissionError(
            f"{what}: the Hub refused the token ({status or 'there is none'}). Log in with "
            "`hf auth login`, or set HF_TOKEN, with a token that may write to this repository"
        )
    if status == _TOO_MANY:
        wait = wait_asked_for(error)
        when = "to slow down" if wait is None else f"to wait {wait:g} s"
        return ConnectionError(
            f"{what}: the Hub asks {when} (429). Nothing was changed; push again later: files that "
            "are there are not sent again"
        )
    if is_cut(error) or (status is not None and status >= 500):
        return ConnectionError(
            f"{what}: {_in_short(error)}, also after waiting. Nothing was changed; push again "
            "later: files that are there are not sent again"
        )
    return error


def give_up(what: str, error: Exception) -> NoReturn:
    """Raise `explained(what, error)`."""
    words = explained(what, error)
    if words is error:
        raise error
    raise words from error


def _in_short(error: BaseException) -> str:
    status = status_of(error)
    return "the connection was cut" if status is None else f"the Hub answered {status}"


def _answer(error: BaseException) -> Any:
    return next((e for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    # The Hub's client wraps what goes wrong while a file is sent.
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
