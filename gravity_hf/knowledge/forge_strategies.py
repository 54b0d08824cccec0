"""Which layers, which rank and which directions a forge tries, and what a failure leads to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .errors import ValidationError

RANKS = (1, 2, 4, 8, 16)
# What a delta is kept clear of: nothing, what others read, also what others' inputs are made of.
FREE, PROJECTED, NULL = "free", "projected", "null"
# How an attempt can fail.
NOT_VALID, INTERFERES, NO_ROOM, TOO_COSTLY = "validation", "interference", "capacity", "budget"


class Attempt(NamedTuple):
    """One way to train a delta.

    Args:
        layers: numbers of decoder layers.
        rank: of the update of each map.
        space: `"free"`, `"projected"` or `"null"`.
        against: ids whose prompts are to be left alone, in the null space.
    """

    layers: tuple[int, ...]
    rank: int
    space: str
    against: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "layers": list(self.layers), "against": list(self.against)}


def layer_strategies(count: int) -> list[tuple[int, ...]]:
    """Layers to try for a decoder of `count` layers, from few to all: around the middle, 2, 3 and a
    third of all to each side, then everything; what is the same is listed once."""
    middle = count // 2
    found: list[tuple[int, ...]] = []
    for reach in (2, 3, count // 3, count):
        layers = tuple(range(max(0, middle - reach), min(count, middle + reach + 1)))
        if layers not in found:
            found.append(layers)
    # A third of few layers is less than two: from few to many all the same.
    return sorted(found, key=len)


class Ladder:
    """The order in which a forge tries.

    Ranks are climbed on the fewest layers first. A failed *validation* leads to the next rank, then
    to more layers at the last rank. *Interference* leads to the null space, on the same layers at
    the same rank: more layers would only interfere more. No room and no budget lead nowhere: all
    that would come after needs more.

    Args:
        layers: of `layer_strategies`, or one choice.
        ranks: ascending.
        space: of the first attempt.
    """

    def __init__(self, layers: Sequence[tuple[int, ...]], ranks: Sequence[int], space: str) -> None:
        if not layers or not ranks or any(type(r) is not int or r < 1 for r in ranks):
            raise ValidationError(
                f"forge: expected layers and ranks of at least 1, got {layers!r} and {ranks!r}"
            )
        self.layers, self.ranks, self.space = list(layers), sorted(set(ranks)), space

    def first(self) -> Attempt:
        """What is tried first."""
        return Attempt(self.layers[0], self.ranks[0], self.space)

    def after(
        self, attempt: Attempt, failure: str, conflicts: Sequence[str] = ()
    ) -> Attempt | None:
        """What is tried when `attempt` failed so; None: nothing is left.

        Args:
            conflicts: ids of the deltas that were disturbed, where it interferes.
        """
        if failure == INTERFERES:
            against = tuple(sorted({*attempt.against, *conflicts}))
            if attempt.space == NULL and against == attempt.against:
                return None
            return attempt._replace(space=NULL, against=against)
        if failure != NOT_VALID:
            return None
        higher = [rank for rank in self.ranks if rank > attempt.rank]
        if higher:
            return attempt._replace(rank=higher[0])
        wider = self.layers[self.layers.index(attempt.layers) + 1 :]
        return attempt._replace(layers=wider[0]) if wider else None
