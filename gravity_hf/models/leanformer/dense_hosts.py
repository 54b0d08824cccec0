"""Which hosts a LeanFormer can be made of, and what of their settings it takes over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from ..converting import plain_config_errors
from .configuration_leanformer import LeanFormerConfig

# All of them compute a LeanFormer's layer, with other choices.
HOSTS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
MAPS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Nothing is left out, so that at full rank the logits are the host's.
_DENSE = {"screening": "none", "feed_forward_policy": "dense", "exit_heads": False}
_BY_RANK = ("attention_rank", "feed_forward_rank", "rank_pattern", "head_rank")


def check_host(host: nn.Module) -> PreTrainedModel:
    """The host.

    Raises:
        TypeError: another model.
        ValueError: one of these, quantised, offloaded, with adapters, or already changed.
    """
    if type(host) not in HOSTS or not isinstance(host, PreTrainedModel):
        names = ", ".join(x.__name__ for x in HOSTS)
        raise TypeError(
            f"from_dense: host: expected one of {names}, got {type(host).__name__}. Any other "
            "transformers model can keep its class and get maps of low rank in place: "
            "gravity_hf.factorize(model)"
        )
    refused = ""
    if getattr(host, "hf_quantizer", None) is not None:
        refused = "a quantised one. Load it without quantization_config"
    elif getattr(host, "peft_config", None) is not None:
        refused = "one with adapters. Merge them: model.merge_and_unload()"
    elif changed := next((n for n, m in host.named_modules() if _is_changed(m)), None):
        refused = f"one whose {changed} is of low rank or sparse. Start from the dense model"
    for name in map_names(host.config):
        module: Any = host.get_submodule(name)
        weight: Any = getattr(module, "weight", None)
        fits = type(module) is nn.Linear and type(weight) is nn.Parameter
        fits = fits and type(weight.data) is Tensor and not weight.is_meta
        if not refused and not (fits and weight.dtype in _FLOATS):
            refused = f"one whose {name} is a changed, sharded, quantised or offloaded map"
    if refused:
        raise ValueError(
            f"from_dense: host: expected a {type(host).__name__} as from_pretrained loads it, in "
            f"memory, got {refused}"
        )
    return host


def _is_changed(module: nn.Module) -> bool:
    """Whether this library has put it there, or has let it leave out keys."""
    ours = type(module).__module__.startswith(f"{__package__.partition('.')[0]}.")
    return ours or hasattr(module, "attention_policy")


def map_names(config: PreTrainedConfig) -> list[str]:
    """Of the linear maps of all layers, which have the same names in a host and in a LeanFormer."""
    return [f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in MAPS]


def config_from(
    host: PreTrainedModel, ranks: Mapping[str, int], settings: Mapping[str, Any]
) -> LeanFormerConfig:
    """The config of a LeanFormer that computes what the host does.

    Args:
        host: as `check_host` wants it.
        ranks: of the maps that are of low rank, by name.
        settings: of `LeanFormerConfig`, those that a host does not say.

    Raises:
        ValueError: settings that the host says, or that do not fit; a host that cannot be one.
    """
    carried = _carried(host)
    given = {LeanFormerConfig.attribute_map.get(key, key): value for key, value in settings.items()}
    said = [name for name in given if name in carried or name in _BY_RANK]
    if said:
        raise ValueError(
            f"from_dense: expected settings that the host does not say, got {said}. Ranks follow "
            "from `rank`, and all else of these from the host"
        )
    inner = carried["intermediate_size"]
    own = {"feed_forward_block": math.gcd(inner, LeanFormerConfig.feed_forward_block)}
    with plain_config_errors():
        return LeanFormerConfig(
            **{**_DENSE, **own, **carried, **given},
            attention_rank=0,
            feed_forward_rank=0,
            rank_pattern={name.removeprefix("model."): rank for name, rank in ranks.items()},
        )


def _carried(host: PreTrainedModel) -> dict[str, Any]:
    config: Any = host.config
    first: Any = host.get_submodule("model.layers.0")
    attention = first.self_attn
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "attention": "dot_product",
        "norm": "rms",
        "norm_eps": config.rms_norm_eps,
        "position": "rope",
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": attention.q_proj.bias is not None,
        "attention_output_bias": attention.o_proj.bias is not None,
        "mlp_bias": first.mlp.gate_proj.bias is not None,
        "qk_norm": getattr(attention, "q_norm", None) is not None,
        "sliding_window": _window(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "compat_reference": False,
        **{key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _window(config: Any) -> int | None:
    """Of all layers alike."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ValueError(
            "from_dense: host: expected layers that all see as far, got "
            f"{' and '.join(sorted(kinds))}. Keep its class: gravity_hf.factorize(model)"
        )
    return None if kinds == {"full_attention"} else getattr(config, "sliding_window", None)
