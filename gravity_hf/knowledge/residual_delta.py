"""Deltas on the residual stream: after a decoder block, `h + B (A h)` instead of `h`.

Published knowledge deltas are of this kind. No delta of linear maps equals them: the update sees
what the whole block gives out, the part that passes beside its maps included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .delta import LowRankDelta
from .errors import IncompatibleBaseError
from .targets import base_model, decoder_layers


@dataclass(frozen=True, eq=False)
class ResidualDelta(LowRankDelta):
    """Factors of one update for each of some decoder blocks.

    Args:
        factors: name of the block in the base model (`"model.layers.3"`) ->
            `(A [r, hidden], B [hidden, r])`.

    Raises:
        ValidationError: no blocks, or factors that do not fit each other.
    """

    kind: ClassVar[str] = "residual"

    def check(self, model: nn.Module) -> None:
        """Raise unless the delta can be put on `model`.

        Raises:
            IncompatibleBaseError: a block that the model lacks, or another hidden size.
            UnsafeFileError: NaN or an infinity.
        """
        blocks, width = decoder_layers(model), hidden_size(model)
        for name, (A, B) in self.factors.items():
            if name not in blocks:
                raise IncompatibleBaseError(
                    f"residual delta: expected blocks from {blocks[0]} to {blocks[-1]}, got "
                    f"{name}. The delta belongs to another base"
                )
            if (A.shape[1], B.shape[0]) != (width, width):
                raise IncompatibleBaseError(
                    f"residual delta: {name}: expected {width} features in and out, got "
                    f"{A.shape[1]} and {B.shape[0]}. The delta belongs to another base"
                )
        self.check_finite()


def hidden_size(model: nn.Module) -> int:
    """Features of the residual stream."""
    return int(base_model(model).config.get_text_config().hidden_size)
