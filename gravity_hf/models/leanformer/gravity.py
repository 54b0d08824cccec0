"""The constants of gravity of a layer's attention, as the config says."""

from __future__ import annotations

from ...layers.head_gravity import HeadGravity
from .configuration_checks import SOFTENING_FLOOR
from .configuration_leanformer import LeanFormerConfig


class LeanFormerGravity(HeadGravity):
    """`HeadGravity` of a config."""

    def __init__(self, config: LeanFormerConfig) -> None:
        super().__init__(
            config.num_attention_heads,
            config.gravity_law,
            strength=config.gravity_strength,
            softening=config.softening_start,
            learn_softening=config.learn_softening,
            floor=SOFTENING_FLOOR,
        )
