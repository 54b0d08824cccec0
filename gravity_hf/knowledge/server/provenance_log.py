"""Which beliefs went into which answer: a hash chain that nobody edits unseen."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from ...runtime.ledger import Ledger
from .problems import ApiError
from .settings import ServerSettings

AGENT = "gravity-hf serve"


class ProvenanceLog:
    """A `runtime.Ledger` of answers and of changes to the store; thread-safe.

    The newest entries are in memory for /provenance; with `settings.log` all are in a file, each
    carrying the hash of the one before it (`gravity-hf ledger verify FILE`). A prompt is logged as
    its SHA-256 unless `settings.log_prompts`; with `settings.log_key` as its HMAC, since the text
    that belongs to a plain digest can be found by trying.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._in_clear, self._key = settings.log_prompts, settings.log_key
        has_file = settings.log is not None
        self._ledger = Ledger(
            AGENT,
            settings.log,
            settings.log_entries,
            write_through=has_file,
            # The end of the process loses nothing; waiting for the disk would slow every answer.
            fsync=False,
            key=settings.log_key if has_file else None,
        )
        self.failed: str | None = None

    def answer(self, request_id: str, prompt: str, details: dict[str, Any]) -> None:
        """Note an answer. Raises as `note`."""
        self.note("answer", {"request_id": request_id, **self._of_prompt(prompt), **details})

    def note(self, event: str, details: dict[str, Any]) -> None:
        """Note an event.

        Raises:
            ApiError: 503 where it could not be written: an answer that leaves no trace is not
                given.
        """
        try:
            self._ledger.log(event, details)
        except (OSError, RuntimeError) as error:
            self.failed = str(error)
            raise ApiError(
                503, "the provenance log cannot be written", "log_unavailable"
            ) from error
        self.failed = None

    def latest(self, count: int) -> list[dict[str, Any]]:
        """The newest `count` entries in memory, oldest first."""
        return [entry.to_dict() for entry in self._ledger.entries()[-count:]]

    def head(self) -> dict[str, Any] | None:
        """Where the chain in the file ends; None without a file."""
        head = self._ledger.head
        return None if head is None else {"count": head.count, "hash": head.hash}

    def __len__(self) -> int:
        return len(self._ledger)

    def _of_prompt(self, prompt: str) -> dict[str, str]:
        text = prompt.encode()
        if self._key is None:
            digest = {"prompt_sha256": hashlib.sha256(text).hexdigest()}
        else:
            digest = {"prompt_hmac_sha256": hmac.new(self._key, text, "sha256").hexdigest()}
        return {**digest, "prompt": prompt} if self._in_clear else digest
