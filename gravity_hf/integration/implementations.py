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
    _forget_changes(model)
    # As the class itself would: `GravityHost` refuses to be told.
    PreTrainedModel.set_attn_implementation(model, ATTENTION_NAME)
    _forget_changes(model)
    # Parts may have copies of one config (an encoder and a decoder, or a head made from a copy of
    # its tower's), which transformers does not reach: what holds for one holds for all.
    configs = configs_of(model)
    named = {type(config) for config in configs if config._attn_implementation == ATTENTION_NAME}
    for config in configs:
        if type(config) in named:
            config._attn_implementation_internal = ATTENTION_NAME


def _forget_changes(model: PreTrainedModel) -> None:
    # transformers 5.17 leaves its note "changed already" on parts of parts, from where it is saved
    # and keeps the loaded model's part from being changed.
    for config in configs_of(model):
        vars(config).pop("_attn_was_changed", None)


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
