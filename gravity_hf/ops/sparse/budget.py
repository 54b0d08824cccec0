"""How many keys a query may look at, and where they may lie."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NoReturn


@dataclass(frozen=True)
class KeyBudget:
    """The keys of one query and key-value head; all units are tokens.

    A query at position `p` (its last visible key) whose first visible key is `f` sees, of the keys
    visible to it:

    - all, if `p - f < max(top_k, min_length)`;
    - otherwise the `sinks` first, the `window` last (its own among them), and the best blocks of
      `block_size` consecutive keys that the budget has room for: at most `top_k` keys in all.

    Blocks are counted from the first key of each batch row, so that a left-padded row chooses as it
    would alone. A block can be chosen by the queries that see every key of it and have at least one
    of them before their window. With `window < block_size - 1` some keys are therefore out of reach
    until their block is complete.
    """

    top_k: int = 512
    block_size: int = 32
    window: int = 64
    sinks: int = 4
    min_length: int = 0

    def __post_init__(self) -> None:
        least = {"top_k": 1, "block_size": 1, "window": 1, "sinks": 0, "min_length": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < least[field.name]:
                _refuse(field.name, f"an integer >= {least[field.name]}", value)
        if self.window + self.sinks > self.top_k:
            got = f"{self.top_k}, with window={self.window} and sinks={self.sinks}"
            _refuse("top_k", "at least window + sinks, which it includes", got)

    @property
    def chosen_blocks(self) -> int:
        """Blocks that a query chooses, beside its window and sinks."""
        return (self.top_k - self.window - self.sinks) // self.block_size

    @property
    def dense_length(self) -> int:
        """A query that sees no more keys than this sees all of them."""
        return max(self.top_k, self.min_length)

    @property
    def dense_blocks(self) -> int:
        """Blocks that hold all keys before the window of a query with `dense_length` keys, wherever
        the first of these lies in its block."""
        return -(-(self.dense_length - self.window) // self.block_size) + 1

    def covers(self, keys: int) -> bool:
        """Whether attention to this many keys is dense: then it is the dense call, bit for bit."""
        return keys <= self.dense_length


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"KeyBudget.{name}: expected {expected}, got {got!r}")
