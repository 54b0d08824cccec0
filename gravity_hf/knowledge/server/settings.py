"""How a server behaves: who may ask, and how much of everything."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path

SHORTEST_TOKEN = 16
# Of the settings that are counts or seconds: the least that makes sense.
_LEAST = {
    "port": 0,
    "max_prompt_chars": 1,
    "max_prompt_tokens": 1,
    "max_new_tokens": 1,
    "max_body_bytes": 1024,
    "max_beliefs": 0,
    "max_choices": 1,
    "max_connections": 2,
    "queue": 1,
    "active_rows": 1,
    "batch_rows": 1,
    "timeout_s": 0.01,
    "header_timeout_s": 0.01,
    "body_timeout_s": 0.01,
    "send_timeout_s": 0.01,
    "mutation_timeout_s": 0.01,
    "shutdown_timeout_s": 0.0,
    "verify_every_s": 0.0,
    "log_entries": 1,
}


@dataclass(frozen=True)
class ServerSettings:
    """Frozen; checked when made.

    Args:
        token: what clients send as `Authorization: Bearer ...` to get answers. None: nobody has to
            send one, which only a loopback address allows.
        admin_token: what is sent to change beliefs, to consolidate and to read the log. None: on a
            loopback address `with_admin_token` makes one.
        host, port: where to listen; port 0 takes a free one.
        max_prompt_chars, max_prompt_tokens, max_new_tokens, max_body_bytes, max_beliefs,
            max_choices: bounds of one request.
        max_connections: open connections; more are answered 503.
        queue: texts that may wait for the model; more are answered 429.
        active_rows: texts that are written at the same time.
        batch_rows: how many of them share a forward pass. 1: each text is computed exactly as if
            it were alone, bit for bit. More is faster on a GPU and equal up to rounding.
        timeout_s: seconds from a request's acceptance to its last token, waiting included.
        mutation_timeout_s: the same for changes of beliefs (encoding a fact trains).
        header_timeout_s, body_timeout_s: how long a client may take to send its headers, its body.
        send_timeout_s: how long a client may take to take a piece of the answer.
        shutdown_timeout_s: how long texts in work may go on once the server is told to stop.
        verify_every_s: seconds between two verifications of the base; 0: at start-up only.
        log: the file of the provenance log; None: in memory only.
        log_entries: that many are kept in memory.
        log_prompts: write prompts as they are; otherwise their SHA-256 only.
        log_key: secret of the log's hash chain.

    Raises:
        ValueError: a bound below what makes sense; tokens that are too short or equal.
    """

    token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)
    host: str = "127.0.0.1"
    port: int = 8000
    max_prompt_chars: int = 32_768
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 512
    max_body_bytes: int = 1 << 20
    max_beliefs: int = 64
    max_choices: int = 8
    max_connections: int = 256
    queue: int = 64
    active_rows: int = 8
    batch_rows: int = 1
    timeout_s: float = 60.0
    mutation_timeout_s: float = 600.0
    header_timeout_s: float = 10.0
    body_timeout_s: float = 15.0
    send_timeout_s: float = 30.0
    shutdown_timeout_s: float = 20.0
    verify_every_s: float = 3600.0
    log: Path | None = None
    log_entries: int = 1000
    log_prompts: bool = False
    log_key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"ServerSettings.{name}: expected at least {least}, got {value!r}")
        for name in ("token", "admin_token"):
            value = getattr(self, name)
            if value is not None and not _is_token(value):
                raise ValueError(
                    f"ServerSettings.{name}: expected {SHORTEST_TOKEN} or more visible ASCII "
                    f"characters, got {len(value)} characters. Make one with: python -c "
                    "'import secrets; print(secrets.token_urlsafe(32))'"
                )
        if self.token is not None and self.token == self.admin_token:
            raise ValueError(
                "ServerSettings: expected two different tokens, got the same as token and as "
                "admin_token. Who may ask may not thereby change what is known"
            )

    def with_admin_token(self) -> ServerSettings:
        """These settings with an admin token: the one given, or a new random one."""
        if self.admin_token is not None:
            return self
        return replace(self, admin_token=secrets.token_urlsafe(32))

    def check_bind(self) -> None:
        """Raise unless what can be reached from elsewhere asks for tokens.

        Raises:
            ValueError: the address is not a loopback one and a token is missing.
        """
        missing = [n for n in ("token", "admin_token") if getattr(self, n) is None]
        if missing and not is_loopback(self.host):
            raise ValueError(
                f"serve: expected {' and '.join(missing)} for the address {self.host!r}, which "
                "other machines can reach, got none. Set GRAVITY_HF_TOKEN and "
                "GRAVITY_HF_ADMIN_TOKEN, or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name counts when it is `localhost`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_token(value: str) -> bool:
    return len(value) >= SHORTEST_TOKEN and all("!" <= letter <= "~" for letter in value)
