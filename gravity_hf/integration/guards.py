"""Refusals of whatever would run weights made for gravity as dot-product attention.

Which attention a model runs is a name in its configs, which anybody may set. Three places hold it
to gravity: what an export's `config.json` says, what a gravity class is built from, and what an
attention module finds in its config each time it is called. The other way round, `"gravity"` in the
config of a host's own class does not give it masses.

`config.json` says it twice. The attention that it names can be overridden by an argument; the file
of weights that it names cannot, and no such file can be. Only a host's own class that is given a
config from elsewhere than the export is out of reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .autos import MODEL_TYPE_PREFIX
from .carrier import CARRIER_NAME, is_served
from .implementations import ATTENTION_NAME

# In `config.json`, where transformers lets any class read it: no attention and no file of weights
# has this name, so the host's own class refuses, and its error quotes it.
EXPORT_NAME = "gravity-only: load by an Auto class with gravity_hf or trust_remote_code=True"
# Where `config.json` names the file that transformers reads weights from, if it names one.
WEIGHTS_KEY = "transformers_weights"
# In `adapter_config.json`, for peft, which refuses types that it does not know.
GRAVITY_LORA = "GRAVITY_LORA"
_OURS = (None, ATTENTION_NAME, EXPORT_NAME)
# transformers' own choices for a part of which nobody said anything; gravity takes their place.
_DEFAULTS = ("eager", "sdpa")


def name_in_export(values: dict[str, Any], config: PreTrainedConfig) -> None:
    """Write `EXPORT_NAME` into `values`, the dict of a gravity config, and into those of its parts:
    a tower's own class can read its part of a checkpoint, too."""
    for _, part_values in _with_parts(config, values):
        part_values["attn_implementation"] = EXPORT_NAME


def name_weights_in_export(values: dict[str, Any], config: PreTrainedConfig) -> None:
    """Write `EXPORT_NAME` into `values`, what becomes of a gravity config in `config.json`, as the
    file of weights to read: the host's own class is refused whichever attention it asks for."""
    for _, part_values in _with_parts(config, values):
        part_values[WEIGHTS_KEY] = EXPORT_NAME


def without_weights_name(values: dict[str, Any]) -> dict[str, Any]:
    """What `name_weights_in_export` was given, from what it wrote; the same where it wrote none."""
    kept = {k: v for k, v in values.items() if (k, v) != (WEIGHTS_KEY, EXPORT_NAME)}
    return {k: without_weights_name(v) if isinstance(v, dict) else v for k, v in kept.items()}


def refuse_other_attention(model: str, requested: Any) -> None:
    """Raise ValueError if `requested` is an attention name that is not gravity's."""
    if requested not in _OURS:
        raise ValueError(
            f"{model}: expected attn_implementation 'gravity' (or none given), got {requested!r}, "
            "which would run dot-product attention on weights made for gravity. To go back to the "
            "host, call unpatch_gravity(model)"
        )


def refuse_other_names(model: str, config: PreTrainedConfig) -> None:
    """Raise ValueError if `config`, or that of a part, names other attention.

    Runtimes with an attention of their own write its name into the config of the text part alone,
    and hand a model neither masks nor caches afterwards.
    """
    for part, _ in _with_parts(config, {}):
        if part is config or part._attn_implementation not in _DEFAULTS:
            refuse_other_attention(model, part._attn_implementation)


def refuse_lost_masses(module: nn.Module) -> None:
    """Raise ValueError if a module without masses has the config of a gravity checkpoint: it was
    loaded by the host's own class, which has no place for them. A gravity class may leave modules
    to dot products."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "gravity", None) is None:
        return
    if not type(config).model_type.startswith(MODEL_TYPE_PREFIX):
        raise ValueError(
            f"{type(module).__name__}: expected masses, as its config.gravity has it, found none: "
            "the host's own class dropped them. Load the checkpoint with an Auto class"
        )


def watch(module: nn.Module) -> None:
    """Let a converted attention module refuse to be called under another attention's name."""
    unwatch(module)  # a part that was built on its own is watched already
    module.register_forward_pre_hook(_only_gravity)


def unwatch(module: nn.Module) -> None:
    """Undo `watch`."""
    hooks = module._forward_pre_hooks
    # By function: a handle of `watch` would not know the hooks of a copied or unpickled module.
    for key in [key for key, hook in hooks.items() if hook is _only_gravity]:
        del hooks[key]


def _with_parts(
    config: PreTrainedConfig, values: dict[str, Any]
) -> Iterator[tuple[PreTrainedConfig, dict[str, Any]]]:
    """`config` and the configs within it, each with its own dict within `values`."""
    yield config, values
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _with_parts(part, values.get(name, {}))


def _only_gravity(module: nn.Module, _: Any) -> None:
    config = getattr(module, "config", None)
    name = getattr(config, "_attn_implementation", ATTENTION_NAME)
    if name == ATTENTION_NAME or (name == CARRIER_NAME and is_served(config)):
        return
    raise ValueError(
        f"{type(module).__name__}: expected config._attn_implementation 'gravity', got {name!r}, "
        "set after the model was made: dot-product attention on weights made for gravity. To go "
        "back to the host, call unpatch_gravity(model)"
    )
