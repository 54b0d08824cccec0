"""Which attention the configs of a model name: read, set and put back for all of its parts."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# The name under which attention and mask are registered.
ATTENTION_NAME = "gravity"


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config object of `model`, each once, in an order that copies of it share."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop(0)
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def name_gravity(model: PreTrainedModel) -> None:
    """Let every part of `model` that transformers can set name gravity as its attention."""
    # As the class itself would: `GravityHost` refuses to be told.
    PreTrainedModel.set_attn_implementation(model, ATTENTION_NAME)
    # Parts may have copies of one config (an encoder and a decoder, or a head made from a copy of
    # its tower's), which transformers does not reach: what holds for one holds for all.
    configs = configs_of(model)
    named = {type(config) for config in configs if config._attn_implementation == ATTENTION_NAME}
    for config in configs:
        if type(config) in named:
            config._attn_implementation_internal = ATTENTION_NAME


def restore_attention(
    model: PreTrainedModel, originals: Iterable[tuple[PreTrainedConfig, str | None]]
) -> None:
    """Undo `name_gravity`: every config gets its name back; one that came later, or of which
    nothing is known, the host's default."""
    for config, implementation in originals:
        config._attn_implementation_internal = implementation
    for config in configs_of(model):
        if config._attn_implementation == ATTENTION_NAME:
            config._attn_implementation_internal = model.get_correct_attn_implementation(None)
