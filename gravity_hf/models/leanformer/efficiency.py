"""What a LeanFormer has and computes beside the dense model of its shape, by arithmetic."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...layers.low_rank import LowRankLinear
from ...layers.sparse_feed_forward import SparseFeedForward
from .attention import LeanFormerAttention
from .compat_attention import PublishedAttention


def efficiency(model: nn.Module, length: int | None = None) -> dict[str, Any]:
    """Counts, and shares of what a dense model would have; nothing is run, and no time is said:
    what is not computed saves time only where the kernels are as fast.

    The dense model has the same shape, embeddings, norms and head, dense maps in the layers, and no
    screening, predictor or exit head.

    * `parameters`: of the whole model, a tied weight once; `layer_parameters`: of the layers.
    * `dense_parameters`, `dense_layer_parameters`: of the dense model.
    * `compression`, `layer_compression`: how many times more those are.
    * `pairs`: of the causal pairs of a text of `length` tokens, those whose score is computed, a
      mean over layers; `pairs_with_screening`: and the screening, in the same unit: a product of
      two vectors of the screening's width for every block of keys.
    * `neurons`: those that a token's output comes from, of the feed-forward's; `computed_neurons`:
      those that are computed: under `"masked"` all of them are.
    """
    length = length or int(model.config.max_position_embeddings)
    layers = _layers(model)
    own = sum(x.numel() for x in layers.parameters())
    whole = sum(x.numel() for x in model.parameters())
    head = getattr(_base(model), "exit_head", None)
    exits = sum(x.numel() for x in head.parameters()) if head is not None else 0
    dense = _dense_parameters(layers)
    dense_whole = whole - own - exits + dense
    pairs = [_pairs(x, length) for x in _of(layers, LeanFormerAttention)]
    neurons = [_neurons(x) for x in _of(layers, SparseFeedForward)]
    return {
        "length": length,
        "parameters": whole,
        "layer_parameters": own,
        "dense_parameters": dense_whole,
        "dense_layer_parameters": dense,
        "compression": dense_whole / whole,
        "layer_compression": dense / own,
        "pairs": _mean(x for x, _ in pairs),
        "pairs_with_screening": _mean(x for _, x in pairs),
        "neurons": _mean(x for x, _ in neurons),
        "computed_neurons": _mean(x for _, x in neurons),
    }


def _dense_parameters(layers: nn.Module) -> int:
    """Of the layers, with dense maps."""
    extra = ("predictor.", "screening.", "q_screen.", "k_screen.")
    factors = {
        name: map_ for name, map_ in layers.named_modules() if isinstance(map_, LowRankLinear)
    }
    total = 0
    for name, value in layers.named_parameters():
        if any(part in name for part in extra):
            continue
        inside = name.rpartition(".")[0].rpartition(".")[0]
        if inside not in factors or name.endswith(".bias"):
            total += value.numel()
        elif name.endswith("up.weight"):
            total += factors[inside].in_features * factors[inside].out_features
    return total


def _pairs(layer: LeanFormerAttention, length: int) -> tuple[float, float]:
    """Shares of causal pairs: scores of the exact pass, and with the screening."""
    dense = not layer.chooses or layer.attention_policy == "dense"
    if dense or length <= layer.dense_length:
        return 1.0, 1.0
    if isinstance(layer, PublishedAttention):
        # All scores are computed, and most of them hidden.
        return 1.0, 1.0 + layer.screening_cost
    whole, later = layer.dense_length, length - layer.dense_length
    chosen = whole * (whole + 1) / 2 + later * layer.budget.top_k
    share = chosen / (length * (length + 1) / 2)
    return share, share + layer.screening_cost


def _neurons(layer: SparseFeedForward) -> tuple[float, float]:
    """Shares of neurons that count, and that are computed."""
    kept = layer.keep / layer.blocks
    counted = 1.0 if layer.policy == "dense" else kept
    return counted, kept if layer.policy == "block" else 1.0


def _base(model: nn.Module) -> nn.Module:
    return model if hasattr(model, "layers") else model.model


def _layers(model: nn.Module) -> nn.Module:
    return _base(model).layers


def _of(layers: nn.Module, kind: type) -> list[Any]:
    return [x for x in layers.modules() if isinstance(x, kind)]


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
