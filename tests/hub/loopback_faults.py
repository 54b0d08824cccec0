"""Faults that a loopback Hub makes on purpose: which request, how often, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Strikes requests whose `METHOD path` matches `pattern`: `times` of them, after `skip`.

    Without `status` the connection is cut: after `cut_after` bytes of the request's body. With
    `done` the work is done first, and only the answer is lost.
    """

    pattern: str
    status: int | None = None
    times: int = 1
    skip: int = 0
    cut_after: int = 0
    done: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    seen: int = 0

    def strikes(self, request: str) -> bool:
        """Whether this request is one of those; counts it."""
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times
