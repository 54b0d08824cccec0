"""Continuous batching of patched models, inside a context."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching import utils as batching_utils
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import gravity_attention_forward
from .carrier import CARRIER_NAME, carried, is_served
from .hosts import GravityHost
from .implementations import ATTENTION_NAME, configs_of
from .own_models import refuse_own

_UPDATE_ARGUMENTS = frozenset(inspect.signature(PagedAttentionCache.update).parameters)

# What the batcher passes to every module for the cache's use. The window is among it: the mask has
# it already, and places in a packed row are not distances in a sequence.
_BATCHING_ARGUMENTS = frozenset(
    {
        "block_table",
        "cache",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "is_causal",
        "logits_indices",
        "logits_processor_args",
        "max_length_k",
        "max_length_q",
        "max_seqlen_k",
        "max_seqlen_q",
        "position_ids",
        "read_index",
        "sliding_window",
        "use_cache",
        "write_index",
    }
)
# Arguments that count places in a sequence, which a packed row of several is not.
_UNPACKABLE_ARGUMENTS = ("position_bias", "indices", "block_indices")


@contextmanager
def gravity_serving(*models: nn.Module) -> Iterator[None]:
    """Let patched models run under continuous batching: `generate_batch`,
    `init_continuous_batching` and what builds on them, with the text that `generate` gives.

        with gravity_serving(model):
            outputs = model.generate_batch(prompts, generation_config=greedy)

    Never runs a flash kernel, whatever `auto_switch_to_flash` says. Contexts may be nested and may
    overlap in threads; `generate` works inside too. On leaving, also by an exception, everything is
    as before: stop the managers that you started yourself first.

    Args:
        *models: decoders patched with gravity, bare or under peft.

    Raises:
        RuntimeError: a model is not patched, or its attention was set to something else.
        TypeError: a model does not generate, is an encoder-decoder, or is gravity by construction
            (LGT), whose masses have no place in the batcher's cache.
        NotImplementedError: the installed transformers batches in a way not known here.
    """
    _require_known_batching()
    configs = [config for model in models for config in _gravity_configs(model)]
    with carried(configs, paged_attention_forward):
        yield


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`gravity_attention_forward` for calls of the batcher; any other call is passed on as it is.

    Args:
        query: `[1, H, T, D]`, the new tokens of all requests in one row.
        key: `[1, Hkv, T, D]` of the new tokens, or `[1, Hkv, K, D]` where the module has put them
            into the cache already (transformers 5.24).
        value: as `key`.
        attention_mask: additive, `[1, 1, T, K]`; old versions pass one for each type of layer.

    Returns:
        `[1, T, H, Dv]` contiguous; the weights where `output_attentions` asks.
    """
    mask = _mask_of(module, attention_mask)
    if "read_index" in kwargs:
        _refuse_places_in_a_sequence(module, kwargs)
        if kwargs.get("cache") is not None:
            key, value = _through_cache(module, key, value, kwargs)
        kwargs = {name: v for name, v in kwargs.items() if name not in _BATCHING_ARGUMENTS}
    return gravity_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)


def _refuse_places_in_a_sequence(module: nn.Module, arguments: dict[str, Any]) -> None:
    for name in _UNPACKABLE_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__}: expected attention whose arguments hold for a packed "
                f"row, got `{name}`, which counts places in one sequence. Use model.generate "
                "instead of continuous batching"
            )


# Compiled, the write into a view of the cache would copy all of it in every layer.
@torch.compiler.disable
def _through_cache(
    module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Write new keys and values, read all that may be seen, `[1, Hkv, K, D]` each: the attention
    function's work before transformers 5.24."""
    where: dict[str, Any] = {"kwargs": arguments}
    if "kwargs" not in _UPDATE_ARGUMENTS:
        where = {name: arguments[name] for name in ("read_index", "write_index")}
    key, value = arguments["cache"].update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, **where
    )
    if key.dim() == 3:  # [K, Hkv, D] before transformers 5.20
        key, value = (states.transpose(0, 1).unsqueeze(0) for states in (key, value))
    return key, value


def _mask_of(module: nn.Module, masks: Tensor | dict[str, Tensor] | None) -> Tensor | None:
    if not isinstance(masks, dict):
        return masks
    windowed = getattr(module, "sliding_window", None) not in (None, 1)
    return masks["sliding_attention" if windowed else "full_attention"]


def _gravity_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The config objects that name the attention of `model`'s modules."""
    instead = "Its masses have no place in the batcher's cache. Use model.generate"
    refuse_own(model, "gravity_serving", instead)
    host = next((m for m in model.modules() if isinstance(m, GravityHost)), None)
    if host is None:
        raise RuntimeError(
            f"gravity_serving: expected a model patched with gravity, got {type(model).__name__}. "
            "Call patch_with_gravity(model) first; a plain model needs no context"
        )
    if not host.can_generate() or host.config.is_encoder_decoder:
        raise TypeError(
            f"gravity_serving: expected a decoder that generates text, got {type(host).__name__}. "
            "transformers batches no other models continuously"
        )
    current = host.config._attn_implementation
    if current != ATTENTION_NAME and not is_served(host.config):
        raise RuntimeError(
            f"gravity_serving: expected attention {ATTENTION_NAME!r} in {type(host).__name__}, got "
            f"{current!r}. Something set it in place of gravity; load the model again"
        )
    return [
        config
        for config in configs_of(host)
        if is_served(config) or config._attn_implementation == ATTENTION_NAME
    ]


def _require_known_batching() -> None:
    """Raise NotImplementedError unless `CARRIER_NAME` still means what it has to mean."""
    probe = PreTrainedConfig()
    probe._attn_implementation_internal = CARRIER_NAME
    known = {
        f"an attention function {CARRIER_NAME!r}": CARRIER_NAME in ALL_ATTENTION_FUNCTIONS,
        f"masks for {CARRIER_NAME!r}": batching_utils.attn_mask_is_needed(probe),
        "PagedAttentionCache.update with kwargs, or read_index and write_index": (
            "kwargs" in _UPDATE_ARGUMENTS or {"read_index", "write_index"} <= _UPDATE_ARGUMENTS
        ),
    }
    missing = [what for what, there in known.items() if not there]
    if missing:
        raise NotImplementedError(
            f"gravity_serving: expected {' and '.join(missing)}, but transformers "
            f"{transformers.__version__} has none. Use model.generate, or transformers 5.17 to 5.24"
        )
