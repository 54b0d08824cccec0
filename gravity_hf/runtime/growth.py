"""How a gravity model may grow, and growing it without changing what it computes at that moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .ledger import Ledger

ADD_LAYER = "add_layer"
INCREASE_CURVATURE = "increase_curvature"
# The published numbers.
STABILITY_THRESHOLD = 0.95
_ADD_LAYER_ABOVE = 0.98
_CURVATURE_FACTOR = 1.1
_MOST_CURVATURE = 0.5
_DEFAULT_LAYERS, _DEFAULT_CURVATURE = 4, 0.15
GROWTH_STEPS = 100
_ADAPTED = "one with adapters of peft"
_MERGE = "Merge first (merge_and_unload), grow, then add LoRA"


def propose_architecture_change(
    current_config: Any, stability: float, stability_threshold: float = STABILITY_THRESHOLD
) -> dict[str, Any] | None:
    """What the published scoring proposes for a stability in [0, 1].

    Below the threshold nothing; above 0.98 one more layer; between, ten per cent more curvature, at
    most 0.5; none where that is no growth. A proposal is no evidence that the model would be better
    for it.

    Args:
        current_config: a mapping or config with `num_layers` (4 where missing) and `curvature`
            (0.15 where missing).

    Returns:
        `change`, `new_num_layers` or `new_curvature`, and `reason`; None: no proposal.
    """
    # So that NaN, too, proposes nothing.
    if not stability >= stability_threshold:
        return None
    if stability > _ADD_LAYER_ABOVE:
        return {
            "change": ADD_LAYER,
            "new_num_layers": _read(current_config, "num_layers", _DEFAULT_LAYERS) + 1,
            "reason": f"stability={stability:.3f} exceeds add_layer threshold",
        }
    curvature = grown_curvature(_read(current_config, "curvature", _DEFAULT_CURVATURE))
    if curvature is None:
        return None
    return {
        "change": INCREASE_CURVATURE,
        "new_curvature": curvature,
        "reason": f"stability={stability:.3f}; moderate growth via curvature",
    }


def grown_curvature(curvature: float) -> float | None:
    """Ten per cent more, of the same sign and at most 0.5 in size; None where that is not more."""
    size = round(min(abs(curvature) * _CURVATURE_FACTOR, _MOST_CURVATURE), 4)
    return math.copysign(size, curvature) if size > abs(curvature) else None


def can_grow(model: Any, change: str) -> bool:
    """Whether `apply_architecture_change` could make this change to `model`."""
    if has_adapters(model):
        return False
    if change == ADD_LAYER:
        return callable(getattr(model, "add_layer", None))
    return has_curvature(model)


def has_adapters(model: nn.Module) -> bool:
    """Whether peft wraps `model` or has put its layers into it."""
    kept = ("base_layer", "original_module")
    return hasattr(model, "get_base_model") or any(
        name in module._modules for module in model.modules() for name in kept
    )


def has_curvature(model: nn.Module | None) -> bool:
    """Whether `model.curvature` can be set: embeddings have one that is a tensor."""
    return getattr(type(getattr(type(model), "curvature", None)), "__set__", None) is not None


class CurvatureGrowth:
    """Moves `model.curvature` in a straight line from what it is to `target`.

    Nothing changes before the first step. Call `step` after each optimizer step.

    Args:
        model: with a `curvature` that can be set.
        target: kappa at the end, `|target| < 1`: beyond it distances fold over.
        steps: how many calls of `step` it takes.
    """

    def __init__(self, model: nn.Module, target: float, steps: int = GROWTH_STEPS) -> None:
        _refuse_without_curvature(model)
        if not abs(target) < 1.0:
            raise ValueError(f"CurvatureGrowth: target: expected |target| < 1, got {target!r}")
        if steps < 1:
            raise ValueError(f"CurvatureGrowth: steps: expected at least 1, got {steps!r}")
        self.model: Any = model
        self.start, self.target, self.steps = float(self.model.curvature), float(target), steps
        self.taken = 0

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return self.taken >= self.steps

    def step(self) -> float:
        """One step; the curvature now. At the target it stays there."""
        if not self.done:
            self.taken += 1
            share = self.taken / self.steps
            here = self.target if self.done else self.start + share * (self.target - self.start)
            self.model.curvature = here
        return float(self.model.curvature)


@dataclass(frozen=True)
class ArchitectureChange:
    """A proposal that was applied.

    Attributes:
        change: `add_layer` or `increase_curvature`.
        before, after: number of layers, or curvature; that of `after` is where `growth` leads.
        parameters: the new ones, by name in the model: an optimizer that exists already does not
            know them. `optimizer.add_param_group({"params": list(change.parameters.values())})`.
        growth: what moves the curvature; None for a layer.
    """

    change: str
    before: float
    after: float
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    growth: CurvatureGrowth | None = None


def apply_architecture_change(
    model: nn.Module,
    proposal: Mapping[str, Any],
    *,
    ledger: Ledger | None = None,
    steps: int = GROWTH_STEPS,
) -> ArchitectureChange:
    """Grow `model` as `proposal` says. What it computes does not change at that moment, up to the
    rounding and `eps` of one more norm: a new layer adds nothing until it is trained, and the
    curvature moves with `change.growth.step()`.

    Args:
        model: an LGT, with or without a head; for curvature, any with one that can be set. Not
            under adapters, whose files hold neither the layer nor the curvature.
        proposal: of `propose_architecture_change` or containment.
        ledger: gets an `architecture_change`.
        steps: over how many steps the curvature moves.

    Raises:
        ValueError: the proposal is none, or not of this model as it is now.
        TypeError: the model cannot grow in this way.
        In both cases nothing is changed.
    """
    change = proposal.get("change")
    if has_adapters(model):
        raise TypeError(
            f"apply_architecture_change: expected a model without adapters, got {_ADAPTED} of "
            f"{type(model).__name__}: saving the adapter would lose the growth. {_MERGE}"
        )
    if change == ADD_LAYER:
        applied = _add_layer(model, _number(proposal, "new_num_layers"))
    elif change == INCREASE_CURVATURE:
        growth = CurvatureGrowth(model, _number(proposal, "new_curvature"), steps)
        applied = ArchitectureChange(change, growth.start, growth.target, growth=growth)
    else:
        raise ValueError(
            f"apply_architecture_change: expected change {ADD_LAYER!r} or {INCREASE_CURVATURE!r}, "
            f"got {change!r}. Pass what propose_architecture_change returned"
        )
    if ledger is not None:
        record = {"change": change, "before": applied.before, "after": applied.after}
        ledger.log("architecture_change", {**record, "reason": proposal.get("reason", "")})
    return applied


def _add_layer(model: Any, wanted: float) -> ArchitectureChange:
    if not callable(getattr(model, "add_layer", None)):
        raise TypeError(
            f"apply_architecture_change: expected a model with add_layer(), such as an LGT, got "
            f"{type(model).__name__}. A converted host keeps the depth that it was trained with"
        )
    before = model.config.num_hidden_layers
    if wanted != before + 1:
        raise ValueError(
            f"apply_architecture_change: expected a proposal for {before + 1} layers, as the model "
            f"has {before}, got {wanted!r}. Ask for a new proposal"
        )
    known = {id(parameter) for parameter in model.parameters()}
    model.add_layer()
    new = {name: p for name, p in model.named_parameters() if id(p) not in known}
    return ArchitectureChange(ADD_LAYER, before, model.config.num_hidden_layers, new)


def _refuse_without_curvature(model: nn.Module) -> None:
    if not has_curvature(model):
        raise TypeError(
            f"expected a model with a curvature of its own that can be set, such as an LGT, got "
            f"{type(model).__name__} without"
        )


def _number(proposal: Mapping[str, Any], key: str) -> float:
    value = proposal.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"apply_architecture_change: {key}: expected a number, got {value!r} in "
            f"{dict(proposal)}"
        )
    return value


def _read(config: Any, name: str, default: Any) -> Any:
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)
