"""How the forces of an LGT become weights, and by which implementation."""

from __future__ import annotations

from typing import NamedTuple

from ..implementations import implementation_of
from .configuration_lgt import LGTConfig


class Law(NamedTuple):
    """What one forward reads of its configuration, once: a transformers config is slow to read.

    Fields are those of `LGTConfig`, but `power`: whether weights are forces, which need no ceiling;
    and `implementation`, the operator's.
    """

    power: bool
    max_force: float | None
    force_cap: str
    is_causal: bool
    exclude_self: bool
    max_position_embeddings: int
    curvature: float
    event_horizon: float
    softening: float
    length_unit: float
    implementation: str

    @classmethod
    def of(cls, config: LGTConfig) -> Law:
        # Its attributes without the library's ways of asking for them.
        known = vars(config)
        power, cap = known["force_law"] == "power", known["max_force"]
        return cls(
            power,
            None if power or cap is None else float(cap),
            known["force_cap"],
            known["is_causal"],
            known["exclude_self"],
            known["max_position_embeddings"],
            float(known["curvature"]),
            float(known["event_horizon"]),
            float(known["softening"]),
            config.length_unit,
            implementation_of(config, "an LGT"),
        )
