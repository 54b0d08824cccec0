"""What gravity attention refuses, and why: said by name, never swallowed in `**kwargs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keyword arguments of attention calls that change the mathematics and have no meaning here yet.
REFUSED_ARGUMENTS = {
    "cache": "a paged cache (continuous batching)",
    "read_index": "places in a paged cache (continuous batching)",
}

# Classes that look their attention up in transformers' registry, yet not for attention between
# tokens: what they hand over as heads are positions, so that no head could have a mass of its own.
NO_HEADS = (
    "Inkling2BlockAttentionResidual",
    "Inkling2LoopBlockAttentionResidual",
    "Inkling2LoopMessageAttentionResidual",
)

# Configs of towers whose attention inverts the mask it is given (`logical_not`) before it folds it
# into its position scores: right for a boolean mask, upside down for an additive one, also in
# transformers' own eager attention.
BOOLEAN_MASKS = ("nemotron_asr_streaming_encoder",)

# Classes whose `is_causal` is set and not meant: their hosts, which know eager attention only, let
# tokens see each other both ways.
CAUSAL_IN_NAME_ONLY = ("BridgeTowerSelfAttention",)


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if an attention call carries an argument that would be silently ignored."""
    for name, meaning in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(
                f"gravity attention cannot honour argument `{name}`: {meaning}. Expected a call "
                "without it, or one inside `with gravity_serving(model):`, set up, run and stopped "
                "there"
            )
