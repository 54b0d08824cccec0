"""Memory that blocks of scores are written to one after another."""

from __future__ import annotations

import math

from torch import Tensor


class Space:
    """Uninitialised memory by name, touched for the first time once in a call.

    A block's worth of fresh memory costs a CPU several times what writing to it does.
    """

    def __init__(self, like: Tensor) -> None:
        """`like`: a tensor of the dtype and device."""
        self._like = like
        self._spaces: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Contiguous memory of a shape; for the same name it is the same memory."""
        size = math.prod(shape)
        space = self._spaces.get(name)
        if space is None or space.shape[0] < size:
            space = self._spaces[name] = self._like.new_empty(size)
        return space[:size].view(shape)
