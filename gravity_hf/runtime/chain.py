"""The lines of a ledger's file, and how each is tied to the one before it.

A line is one JSON object: `entry_id`, `timestamp`, `agent_id`, `event`, `payload`, and then
`previous`, the hash of the line before, and `hash`: SHA-256 of the line's position in the file
(0-based), `previous`, and the text of the first five keys. An edited line has another hash; a line
that was removed, inserted or moved does not follow the one before it.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from .encoding import parsed_json, strict_json

GENESIS = "0" * 64
_LINK_KEYS = ("previous", "hash")
PUBLISHED_KEYS = ("entry_id", "timestamp", "agent_id", "event", "payload")


class Head(NamedTuple):
    """Where a ledger's file ends: `count` lines, the hash of the last, `size` in bytes."""

    count: int
    hash: str
    size: int


def link(position: int, previous: str, body: str) -> str:
    """The hash of a line: hex SHA-256. `body` is the JSON of its first five keys."""
    return hashlib.sha256(f"{position}\n{previous}\n{body}".encode()).hexdigest()


def chained_line(position: int, previous: str, body: str) -> tuple[str, str]:
    """The line for `body` without its newline, and its hash."""
    own = link(position, previous, body)
    links = strict_json({"previous": previous, "hash": own})
    return f"{body[:-1]}, {links[1:]}", own


def is_chained(raw: bytes) -> bool:
    """Whether a line says that it belongs to a chain."""
    return "hash" in _object(raw)


def is_entry(raw: bytes) -> bool:
    """Whether a line is an entry of a ledger, as they were before there were chains."""
    return _object(raw).keys() >= set(PUBLISHED_KEYS)


def check_line(raw: bytes, position: int, previous: str) -> tuple[str, str | None]:
    """(the line's hash, None), or (what it was taken for, why the chain does not hold there).

    Args:
        raw: the line without its newline.
        position: its 0-based number in the file.
        previous: the hash of the line before.
    """
    try:
        record: Any = parsed_json(raw)
    except ValueError:
        return previous, "is not JSON: edited or damaged"
    if not isinstance(record, dict) or any(key not in record for key in _LINK_KEYS):
        return previous, "has no hash: inserted, or written by software without a chain"
    if record["previous"] != previous:
        return previous, "does not follow the line before: removed, inserted or moved lines"
    body = strict_json_or_none({k: v for k, v in record.items() if k not in _LINK_KEYS})
    if body is None or chained_line(position, previous, body) != (_text(raw), record["hash"]):
        return previous, "has another hash than its content: edited"
    return record["hash"], None


def strict_json_or_none(value: Any) -> str | None:
    """`strict_json`, or None where the value is none of ours."""
    try:
        return strict_json(value)
    except (ValueError, RecursionError):
        return None


def _object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty where it is something else."""
    try:
        record = parsed_json(raw)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
