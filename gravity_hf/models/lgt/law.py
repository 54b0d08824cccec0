"""How the forces of an LGT become weights, and by which implementation."""

from __future__ import annotations

from typing import NamedTuple

from .configuration_lgt import LGTConfig

# What transformers calls an attention implementation, as the operator knows it. None: what
# `config.implementation` says.
_IMPLEMENTATIONS = {None: None, "sdpa": None, "eager": "reference", "flex_attention": "flex"}


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
            implementation_of(config),
        )


def implementation_of(config: LGTConfig) -> str:
    """The operator's implementation that the model's attention implementation stands for."""
    name = config._attn_implementation
    if name not in _IMPLEMENTATIONS:
        known = [x for x in _IMPLEMENTATIONS if x]
        raise ValueError(f"attn_implementation: an LGT has {known}, got {name!r}")
    return _IMPLEMENTATIONS[name] or config.implementation
