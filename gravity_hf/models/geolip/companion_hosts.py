"""What a companion must know of a host: its width, its blocks, which way it looks, and which of its
tokens are no content."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

# Tokens that vision models put before the patches, by the names of their parameters `[1, n, C]`.
_PREFIX_PARAMETERS = ("cls_token", "distillation_token", "register_tokens")
_IMAGES = "pixel_values"


def encoder_of(host: PreTrainedModel) -> PreTrainedModel:
    """`host`, or of an encoder-decoder its encoder, which is what has features of a whole input.

    Raises:
        TypeError: no transformers model.
    """
    if not isinstance(host, PreTrainedModel):
        raise TypeError(
            f"host: expected a transformers model, got {type(host).__name__}. Give what AutoModel "
            "loads; of a PeftModel, merge_and_unload() first"
        )
    # AutoModel makes both of an encoder that was saved by itself, and its config tells of one.
    parts = (getattr(host, part, None) for part in ("encoder", "decoder"))
    has_both = all(isinstance(part, PreTrainedModel) for part in parts)
    if not (host.config.is_encoder_decoder or has_both):
        return host
    # Of an encoder by itself the config may still tell of both; it is returned as it is.
    encoder = host.get_encoder()
    if not isinstance(encoder, PreTrainedModel):
        raise TypeError(
            f"host: expected an encoder inside of {type(host).__name__} that is a transformers "
            f"model by itself, got {type(encoder).__name__}. Give a host without a decoder"
        )
    return encoder


def width_of(config: PreTrainedConfig) -> int:
    """Width `C` of the hidden states; ValueError where a config does not say."""
    width = getattr(_text_part(config), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"host: expected a config with one hidden_size, got {config.model_type} with "
            f"{width!r}. Hosts whose width changes from layer to layer are not supported"
        )
    return width


def layers_of(config: PreTrainedConfig) -> int:
    """How many blocks a host has; ValueError where a config does not say."""
    count = getattr(_text_part(config), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ValueError(
            f"host: expected a config with num_hidden_layers, got {config.model_type} with "
            f"{count!r}"
        )
    return count


def layer_index(config: PreTrainedConfig, layer: int) -> int:
    """`layer` as an index from 0 (what the first block reads) to `layers_of(config)` (what the host
    ends in); negative ones count from the end. ValueError for one that is not there."""
    count = layers_of(config)
    index = layer + count + 1 if layer < 0 else layer
    if not 0 <= index <= count:
        raise ValueError(
            f"layer: expected an index from {-count - 1} to {count} of the hidden states of "
            f"{config.model_type}, which has {count} layers, got {layer}"
        )
    return index


def blocks_of(host: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a host, in their order.

    Raises:
        ValueError: there is no one list of as many modules as the host has layers.
    """
    count = layers_of(host.config)
    found: dict[str, nn.ModuleList] = {}
    for name, module in host.named_modules():
        # Lists inside of a block, of its parts, may happen to be as long.
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"host: expected one list of {count} blocks in {type(host).__name__}, got "
            f"{sorted(found) or 'none'}. Read and write its last layer instead: read_layer=-1"
        )
    return next(iter(found.values()))


def has_head(host: PreTrainedModel) -> bool:
    """Whether a host computes something of its hidden states, logits say."""
    return host.base_model is not host


def reads_images(host: PreTrainedModel) -> bool:
    return host.main_input_name == _IMAGES


def type_reads_images(model_type: str | None) -> bool:
    """As `reads_images`, of what AutoModel makes of a model type; False for one it does not
    know."""
    if model_type not in CONFIG_MAPPING:
        return False
    found = AutoModel._model_mapping.get(CONFIG_MAPPING[model_type], None)
    return getattr(found, "main_input_name", None) == _IMAGES


def positions_of(host: PreTrainedModel) -> int | None:
    """How many tokens a host has positions for; None where that is not said, or there is no end.

    Where a table of positions has one for padding, as RoBERTa's, those of tokens begin behind it.
    """
    count = getattr(host.config, "max_position_embeddings", None)
    if not isinstance(count, int):
        return None
    for name, module in host.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return count if module.padding_idx is None else count - module.padding_idx - 1
    return count


def is_causal_host(host: PreTrainedModel) -> bool:
    """Whether a host is causal: no token sees a later one. Of an encoder-decoder, the encoder.

    A config does not always say. Then its attention modules do, and where these do not either, a
    model that only comes as a causal language model is one.
    """
    host = encoder_of(host)
    config = host.config
    if isinstance(said := getattr(config, "is_causal", None), bool):
        return said
    if getattr(config, "is_decoder", False):
        return True
    found = {getattr(module, "is_causal", None) for module in host.modules() if module is not host}
    if True in found:
        return True
    if False in found:
        return False
    kind = type(config)
    causal, masked = AutoModelForCausalLM._model_mapping, AutoModelForMaskedLM._model_mapping
    return kind in causal and kind not in masked


def special_ids_of(tokenizer: Any) -> list[int]:
    """Ids of tokens that are no content: all special ones, but for words that the tokenizer does
    not know, which stand for content, unless it has one id for both."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    names = ("bos", "eos", "sep", "pad", "cls", "mask")
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in names}
    ids = set(tokenizer.all_special_ids)
    return sorted(ids - ({unknown} - others))


def prefix_tokens_of(host: PreTrainedModel) -> int:
    """How many tokens a vision model has before those of the patches; 0 for others."""
    if not reads_images(host):
        return 0
    found = {
        name.rpartition(".")[2]: parameter.shape[1]
        for name, parameter in host.named_parameters()
        if name.rpartition(".")[2] in _PREFIX_PARAMETERS and parameter.dim() == 3
    }
    return sum(found.values())


def _text_part(config: PreTrainedConfig) -> Any:
    """Where the sizes are: of a config with several parts, the one that reads text."""
    return config.get_text_config() if config.sub_configs else config
