"""Which implementation of the operator a model's attention implementation stands for."""

from __future__ import annotations

from transformers import PreTrainedConfig

# What transformers calls an attention implementation, as the operator knows it. None: what
# `config.implementation` says.
_IMPLEMENTATIONS = {None: None, "sdpa": None, "eager": "reference", "flex_attention": "flex"}


def implementation_of(config: PreTrainedConfig, name: str) -> str:
    """The operator's implementation; `name`: of the model, as in "an LGT", for an error."""
    asked = config._attn_implementation
    if asked not in _IMPLEMENTATIONS:
        known = [x for x in _IMPLEMENTATIONS if x]
        raise ValueError(f"attn_implementation: {name} has {known}, got {asked!r}")
    return _IMPLEMENTATIONS[asked] or config.implementation
