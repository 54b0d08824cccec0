"""The lines of a ledger's file, and how each is tied to the one before it.

A line is one JSON object: `entry_id`, `timestamp`, `agent_id`, `event`, `payload`, and then
`previous`, the hash of the line before, and `hash`: SHA-256 of the line's position in the file
(0-based), `previous`, and the text of the first five keys. An edited line has another hash; a line
that was removed, inserted or moved does not follow the one before it.

With a key `hash` is the HMAC-SHA256 of the same text, and the end of the file, which lies beside
it, carries one too: nobody without the key can write a line or an end that holds.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from .encoding import parsed_json, strict_json
from .ledger_key import LedgerKey

GENESIS = "0" * 64
_LINK_KEYS = ("previous", "hash")
PUBLISHED_KEYS = ("entry_id", "timestamp", "agent_id", "event", "payload")


class Head(NamedTuple):
    """Where a ledger's file ends: `count` lines, the hash of the last, `size` in bytes."""

    count: int
    hash: str
    size: int

    def signed_text(self) -> str:
        """What a key signs of it. A line begins with its number: none can pass for an end."""
        return f"head\n{self.count}\n{self.hash}\n{self.size}"


def link(position: int, previous: str, body: str, key: LedgerKey | None = None) -> str:
    """The hash of a line: hex SHA-256, of a chain with a key its HMAC. `body` is the JSON of its
    first five keys."""
    text = f"{position}\n{previous}\n{body}"
    return hashlib.sha256(text.encode()).hexdigest() if key is None else key.sign(text)


def chained_line(
    position: int, previous: str, body: str, key: LedgerKey | None = None
) -> tuple[str, str]:
    """The line for `body` without its newline, and its hash."""
    own = link(position, previous, body, key)
    links = strict_json({"previous": previous, "hash": own})
    return f"{body[:-1]}, {links[1:]}", own


def is_chained(raw: bytes) -> bool:
    """Whether a line says that it belongs to a chain."""
    return "hash" in _object(raw)


def is_entry(raw: bytes) -> bool:
    """Whether a line is an entry of a ledger, as they were before there were chains."""
    return _object(raw).keys() >= set(PUBLISHED_KEYS)


def check_line(
    raw: bytes, position: int, previous: str, key: LedgerKey | None = None
) -> tuple[str, str | None]:
    """(the line's hash, None), or (what it was taken for, why the chain does not hold there).

    Args:
        raw: the line without its newline.
        position: its 0-based number in the file.
        previous: the hash of the line before.
        key: of the chain; None where it has none.
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
    chained = None if body is None else chained_line(position, previous, body, key)
    if chained != (_text(raw), record["hash"]):
        other = "" if key is None else ", or written without this key"
        return previous, f"has another hash than its content: edited{other}"
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
