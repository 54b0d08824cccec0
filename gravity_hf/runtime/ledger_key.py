"""The key of a ledger's chain: who has not got it cannot write lines or ends that hold."""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any

SHORTEST = 16


class LedgerKey:
    """Makes hashes of lines and signatures of ends: HMAC-SHA256 with a secret.

    Copies share the secret; it is never shown and never pickled.

    Args:
        secret: `SHORTEST` bytes or more, such as `secrets.token_bytes(32)`.

    Raises:
        TypeError: no bytes.
        ValueError: too short to be a secret.
    """

    def __init__(self, secret: bytes) -> None:
        if not isinstance(secret, bytes):
            raise TypeError(
                f"Ledger: key: expected bytes, got {type(secret).__name__}. Text becomes bytes by "
                ".encode()"
            )
        if len(secret) < SHORTEST:
            raise ValueError(
                f"Ledger: key: expected {SHORTEST} bytes or more, got {len(secret)}. Make one with "
                "secrets.token_hex(32)"
            )
        self._secret = secret

    @classmethod
    def of(cls, key: bytes | LedgerKey | None) -> LedgerKey | None:
        """`key` as one of these; None stays None."""
        return key if key is None or isinstance(key, LedgerKey) else cls(key)

    def sign(self, message: str) -> str:
        """Hex HMAC-SHA256."""
        return hmac.new(self._secret, message.encode(), hashlib.sha256).hexdigest()

    def signs(self, message: str, signature: object) -> bool:
        """Whether `signature` is that of `message`."""
        return isinstance(signature, str) and hmac.compare_digest(
            self.sign(message).encode(), signature.encode(errors="replace")
        )

    def __copy__(self) -> LedgerKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LedgerKey:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "Ledger: expected no pickle of a ledger with a key: the secret would lie in it. Make "
            "the ledger anew where it is needed, with the key from there"
        )

    def __repr__(self) -> str:
        return "LedgerKey(...)"


def key_from_environment(name: str) -> bytes:
    """The key that the environment variable `name` holds, as UTF-8 bytes of its text.

    Raises:
        ValueError: it is not set, or too short to be a secret.
    """
    text = os.environ.get(name, "")
    if len(text.encode()) < SHORTEST:
        state = "none is set" if not text else f"one of {len(text.encode())} bytes"
        raise ValueError(
            f"Ledger: expected a key of {SHORTEST} bytes or more in the environment variable "
            f"{name}, got {state}. Make one: python -c 'import secrets; "
            "print(secrets.token_hex(32))'"
        )
    return text.encode()
