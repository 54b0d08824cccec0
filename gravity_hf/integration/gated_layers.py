"""Gated feed-forward layers of a host: which they are, and sparse ones over the same maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..layers.modes import in_evaluation
from ..layers.sparse_feed_forward import SparseFeedForward, check_sizes

MAPS = ("gate_proj", "up_proj", "down_proj")
_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
# Maps of other kinds of layers, and why those are left alone.
_OTHER_KINDS = {
    "gate_up_proj": "gate and up in one map, which is not cut up",
    "fc1": "two maps and no gate",
    "c_fc": "two maps and no gate",
    "dense_h_to_4h": "two maps and no gate",
}


def gated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those that have the three maps, by name."""
    return {name: module for name, module in model.named_modules() if _has_maps(module)}


def _has_maps(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in MAPS)


def what_it_has(model: nn.Module) -> str:
    """Of other kinds of layers, for an error."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name, reason in _OTHER_KINDS.items():
        if name in names:
            return f"with {name}: {reason}"
    return "without any"


def sparse_over(
    name: str, host: Any, settings: Mapping[str, Any], default: torch.dtype
) -> SparseFeedForward:
    """A dense `SparseFeedForward` over the maps of the host's layer `name`, after both have given
    the same for random inputs, in evaluation and in training. The host is left as it is.

    Args:
        settings: block_size, sparsity, gate_rank.
        default: dtype of the predictor where the maps' weights are quantized.

    Raises:
        ValueError: a layer that computes something else; settings that do not fit.
        RuntimeError: hooks.
    """
    parts = [host, *(getattr(host, part) for part in MAPS)]
    if any(hasattr(part, "_hf_hook") or part._forward_hooks for part in parts):
        raise RuntimeError(
            f"sparsify_feed_forward: expected {name} without hooks, got one that is dispatched "
            "over devices or watched. Load the model on one device (no device_map)"
        )
    activation = next(
        (getattr(host, a) for a in _ACTIVATIONS if callable(getattr(host, a, None))), None
    )
    names = ("in_features", "out_features")
    sizes: list[Any] = [getattr(host.gate_proj, name, None) for name in names]
    if activation is None or None in sizes:
        raise ValueError(
            f"sparsify_feed_forward: expected {name} with an activation and linear maps, got "
            f"{type(host).__name__}. It has not been tried"
        )
    if isinstance(activation, nn.Module) and activation.state_dict():
        raise ValueError(
            f"sparsify_feed_forward: expected {name} with an activation without weights, got "
            f"{type(activation).__name__}. It has not been tried"
        )
    check_sizes(sizes[1], **settings)
    layer = SparseFeedForward(
        *(getattr(host, part) for part in MAPS),
        activation=activation,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        **settings,
    )
    weight = host.gate_proj.weight
    # Quantized weights are of a dtype that nothing else is computed in.
    dtype = weight.dtype if weight.dtype in _COMPUTED_IN else default
    layer.predictor.to(weight.device, dtype)
    _try_out(name, host, layer, dtype)
    layer.training = host.training
    layer.predictor.train(host.training)
    return layer


@torch.no_grad()
def _try_out(name: str, host: nn.Module, layer: SparseFeedForward, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, layer.hidden_size, generator=generator)
    x = x.to(layer.predictor.down.weight.device, dtype)
    with in_evaluation(host), torch.random.fork_rng([x.device] if x.is_cuda else []):
        for training in (False, True):
            expected, got = host.train(training)(x), layer(x)
            if not isinstance(expected, torch.Tensor) or not torch.equal(expected, got):
                raise ValueError(
                    f"sparsify_feed_forward: expected {name} to be down(activation(gate(x)) * "
                    f"up(x)), got a {type(host).__name__} that computes something else in "
                    f"{'training' if training else 'evaluation'}. It stays dense"
                )
