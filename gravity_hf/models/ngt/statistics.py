"""What the gravity of an NGT does with a text, and what its parameters are, in a few numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.reference import squared_distance
from ..visibility import visible_rows
from .attention import NGTAttention
from .call import NGTAttentionCall
from .coordinates import MassEmbedding
from .gravity import NGTGravity

# Of a tensor `[B, H, R, T]`: as many rows at a time as stay below.
_ELEMENTS = 1 << 22
# Beside a weight, so that its logarithm is finite; as published.
_WEIGHT_FLOOR = 1e-9


@torch.no_grad()
def gravity_statistics(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, float]:
    """Means over the layers, from one forward pass without dropout.

    * `gamma_mean`: the strength `g` of the heads; `radius`: of the cutoff, where there is one.
    * `dist_mean`: squared distance of head coordinates; `energy_mean`: `g d^2`; `sparsity_ratio`:
      how many pairs lie outside the cutoff, for `"soft"` how many it scales by less than a half, 0
      without one. These are published as means over all pairs of tokens, a token and itself and
      those that follow it included. `dist_mean_causal`, `energy_mean_causal` and
      `sparsity_ratio_causal` are means over what a token may look at: what stands before it.
    * `entropy_mean`: `-sum_j w ln(w + 1e-9)` in nats, a mean over all rows of weights as the model
      attends; `entropy_mean_causal`: over those rows that have a choice, that is see another token.

    Padding, as key and as query, counts nowhere. No tensor is larger than a few million elements,
    however long the text.

    Args:
        model: an NGT, in any wrapper.
        input_ids: `[B, T]`.
        attention_mask: as in `NGTModel.forward`.

    Raises:
        ValueError: a model without gravity, or one that somebody watches at the moment.
    """
    seen: list[dict[str, Tensor]] = []
    real = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    training = [module for module in model.modules() if module.training]
    with _watched(model, _Statistics(seen, real)):
        try:
            model.eval()
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            for module in training:
                module.training = True
    return _numbers({name: torch.stack([x[name] for x in seen]).mean() for name in seen[0]})


@torch.no_grad()
def parameter_statistics(model: nn.Module) -> dict[str, float]:
    """Of the gravity of all layers, for a training log; nothing is run. A twin has none: `{}`.

    `ngt/gamma_mean` and `ngt/gamma_std` (0 for one head) are of strengths; `ngt/radius_mean`,
    `ngt/softening_mean`, `ngt/bias_mean`, `ngt/mass_exponent_mean` are there where they are
    learned; `ngt/mass_mean` and `ngt/mass_std` are of the masses of all token types.
    """
    layers = [module.gravity for module in model.modules() if isinstance(module, NGTAttention)]
    if not layers:
        return {}
    strengths = torch.cat([layer.strength() for layer in layers])
    found = {"gamma_mean": strengths.mean(), "gamma_std": strengths.std(correction=0)}
    terms = [layer(None) for layer in layers]
    first = terms[0]
    if first.cutoff is not None:
        found["radius_mean"] = torch.stack([x.cutoff.radius.mean() for x in terms]).mean()
    if isinstance(first.eps, Tensor):
        found["softening_mean"] = torch.stack([x.eps.mean() for x in terms]).mean()
    if first.head_bias is not None:
        found["bias_mean"] = torch.stack([x.head_bias.mean() for x in terms]).mean()
    if layers[0].has_exponent:
        exponents = torch.stack([layer.mass_exponent for layer in layers])
        found["mass_exponent_mean"] = exponents.mean()
    table = next((x for x in model.modules() if isinstance(x, MassEmbedding)), None)
    if table is not None:
        masses = nn.functional.softplus(table.weight)
        found |= {"mass_mean": masses.mean(), "mass_std": masses.std(correction=0)}
    return {f"ngt/{name}": value for name, value in _numbers(found).items()}


class _Statistics:
    """Watches every layer; it goes on as it would without."""

    def __init__(self, seen: list[dict[str, Tensor]], real: Tensor | None) -> None:
        self.seen, self.real = seen, real

    def attend(self, call: NGTAttentionCall) -> tuple[Tensor, Tensor | None]:
        self.seen.append(_of_layer(call, self.real))
        return call.gravity()


class _Mean:
    """Of numbers that come in pieces; float64."""

    def __init__(self, like: Tensor) -> None:
        self.total = self.count = like.new_zeros((), dtype=torch.float64)

    def add(self, values: Tensor, counted: Tensor) -> None:
        """`counted`: bool, broadcastable to `values`."""
        counted = counted.expand_as(values)
        self.total = self.total + values.masked_fill(~counted, 0.0).sum(dtype=torch.float64)
        self.count = self.count + counted.sum()

    def value(self) -> Tensor:
        """0 where nothing was counted."""
        return self.total / self.count.clamp(min=1.0)


def _of_layer(call: NGTAttentionCall, real: Tensor | None) -> dict[str, Tensor]:
    terms, keys = call.terms, call.keys
    strength = terms.mass.square()
    names = ("dist_mean", "energy_mean", "sparsity_ratio", "entropy_mean")
    means = {name + kind: _Mean(strength) for name in names for kind in ("", "_causal")}
    for rows in _pieces(call):
        distance_sq = squared_distance(call.queries[:, :, rows], keys)
        weights = call.rows(rows)
        everything, before = _pairs(call, rows, real)
        values = {
            "dist_mean": distance_sq,
            "energy_mean": strength[:, None, None] * distance_sq,
            "sparsity_ratio": _outside(call, distance_sq),
        }
        for name, value in values.items():
            means[name].add(value, everything)
            means[f"{name}_causal"].add(value, before)
        # A row that a cutoff leaves nothing weighs nothing.
        share = weights.score.softmax(-1) * weights.visible
        entropy = -(share * (share + _WEIGHT_FLOOR).log()).sum(-1)
        means["entropy_mean"].add(entropy, everything.any(-1))
        means["entropy_mean_causal"].add(entropy, before.any(-1))
    found = {"gamma_mean": strength.mean().double()}
    if terms.cutoff is not None:
        found["radius"] = terms.cutoff.radius.mean().double()
    return found | {name: mean.value() for name, mean in means.items()}


def _pieces(call: NGTAttentionCall) -> Iterator[Tensor]:
    """Indices of query rows, int64 `[R]`."""
    batch, heads, queries = call.queries.shape[:3]
    size = max(1, _ELEMENTS // max(1, batch * heads * call.keys.shape[2]))
    yield from torch.arange(queries, device=call.queries.device).split(size)


def _pairs(call: NGTAttentionCall, rows: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bool, broadcastable to `[B, H, R, T]`: pairs of tokens, and those among them that are of two
    tokens of which one may look at the other."""
    count = call.keys.shape[2]
    key = torch.arange(count, device=rows.device)
    everything = torch.ones(1, 1, rows.numel(), count, dtype=torch.bool, device=rows.device)
    if real is not None:
        # A model may have read only the end of an input that is too long.
        kept = real[:, -count:] != 0
        everything = (kept[:, rows, None] & kept[:, None, :])[:, None]
    allowed, _ = visible_rows(call.visible, rows, call.query_count(), count)
    return everything, everything & allowed & (key != rows[:, None])


def _outside(call: NGTAttentionCall, distance_sq: Tensor) -> Tensor:
    """1 for pairs outside the cutoff."""
    cutoff = call.terms.cutoff
    if cutoff is None:
        return torch.zeros_like(distance_sq)
    radius_sq = cutoff.radius.to(distance_sq.dtype).square()[:, None, None]
    if cutoff.kind == "soft":
        return ((1.0 - distance_sq / radius_sq).relu() < 0.5).to(distance_sq.dtype)
    return (distance_sq > radius_sq).to(distance_sq.dtype)


@contextmanager
def _watched(model: nn.Module, observer: Any) -> Iterator[None]:
    # Every copy that peft keeps, too.
    layers = [module for module in model.modules() if isinstance(module, NGTGravity)]
    if not layers:
        raise ValueError(
            f"gravity_statistics: expected an NGT, got a {type(model).__name__} without gravity. A "
            "dot-product twin has no such numbers"
        )
    if any(layer.observer is not None for layer in layers):
        raise ValueError(
            "gravity_statistics: expected a model that nobody watches, got one with an observer. "
            "Let that end first"
        )
    try:
        for layer in layers:
            layer.observer = observer
        yield
    finally:
        for layer in layers:
            layer.observer = None


def _numbers(tensors: dict[str, Tensor]) -> dict[str, float]:
    """One wait for the device, not one for each."""
    values = torch.stack([x.double() for x in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))
