"""The constants of gravity of a spectral layer, as the config says."""

from __future__ import annotations

from ...layers.head_gravity import HeadGravity
from .configuration_checks import SOFTENING_FLOOR
from .configuration_geolip import GeolipConfig


class SpectralGravity(HeadGravity):
    """`HeadGravity` of a config."""

    def __init__(self, config: GeolipConfig) -> None:
        super().__init__(
            config.num_attention_heads,
            config.gravity_law,
            strength=config.gravity_strength,
            softening=config.softening_start,
            learn_softening=config.learn_softening,
            floor=SOFTENING_FLOOR,
        )
