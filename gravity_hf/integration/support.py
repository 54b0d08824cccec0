"""What gravity attention refuses, and why. The check at run time is the promise; the one at patch
time is the courtesy of saying so before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

# Keyword arguments of attention calls that change the mathematics and have no meaning here yet.
REFUSED_ARGUMENTS = {
    "softcap": "a cap on dot-product logits",
    "s_aux": "attention sinks, an extra logit per head",
    "sinks": "attention sinks, an extra logit per head",
    "position_bias": "a learned bias added to dot-product logits",
    "indices": "a sparse indexer that selects keys by dot product",
    "block_indices": "a sparse indexer that selects key blocks by dot product",
    "cache": "a paged cache (continuous batching)",
}

# Attributes of attention modules that announce such an argument. A value of None or False is none.
_ANNOUNCING_ATTRIBUTES = {
    "attn_logit_softcapping": "softcap",
    "sinks": "s_aux",
    "has_relative_attention_bias": "position_bias",
    "relative_attention_bias": "position_bias",
    "indexer": "indices",
}


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if an attention call carries an argument that would be silently ignored."""
    for name, meaning in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(_refusal(f"argument `{name}`", meaning))


def refuse_module(name: str, module: nn.Module) -> None:
    """Raise ValueError if an attention module announces an argument that gravity cannot honour."""
    for attribute, argument in _ANNOUNCING_ATTRIBUTES.items():
        # T5 sets its flag to False on the layers that inherit the first layer's bias.
        value = getattr(module, attribute, None)
        inherited = attribute == "has_relative_attention_bias" and value is not None
        if inherited or (value is not None and value is not False):
            where = f"{name} ({type(module).__name__}.{attribute})"
            raise ValueError(_refusal(where, REFUSED_ARGUMENTS[argument]))


def _refusal(what: str, meaning: str) -> str:
    return (
        f"gravity attention cannot honour {what}: {meaning}. Expected an attention whose score "
        "depends on q and k alone; leave such layers out with GravityConfig(layers=[...]) or use "
        "another host"
    )
