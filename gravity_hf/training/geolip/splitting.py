"""What is held out, by seed."""

from __future__ import annotations

import random

__all__ = ["drawn_apart"]

# A verdict takes the context of one from another; of more than these it would take long.
_LEAST, _MOST = 2, 4096


def drawn_apart(total: int, held_out: float, seed: int, what: str) -> list[int]:
    """Numbers from 0 to `total - 1` that are held out, in a random order.

    Args:
        total: how many there are.
        held_out: share of them, in (0, 1); at least 2 are, at most 4096, and never all.
        seed: of the draw.
        what: the numbers are of, for an error.

    Raises:
        ValueError: a share outside of (0, 1), or fewer than 3 altogether.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out: expected a share in (0, 1), got {held_out!r}")
    if total <= _LEAST:
        raise ValueError(
            f"{what}: expected at least {_LEAST + 1}, of which {_LEAST} are held out, got {total}. "
            "Give more"
        )
    count = min(max(_LEAST, round(held_out * total)), _MOST, total - 1)
    return random.Random(seed).sample(range(total), count)
