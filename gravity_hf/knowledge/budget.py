"""How many parameters a fact may cost, counted before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .errors import BudgetError
from .targets import base_model, in_out_features, is_linear


def delta_parameters(model: nn.Module, names: Sequence[str], rank: int) -> int:
    """Numbers in a delta of `rank` on the maps `names`: `rank * (in + out)` each."""
    model = base_model(model)
    return rank * sum(sum(in_out_features(model.get_submodule(name))) for name in names)


def base_parameters(model: nn.Module) -> int:
    """Parameters of the base, tied ones once, without those that peft added.

    Weights quantised into packed bytes count as the numbers that they stand for.
    """
    model = base_model(model)
    total = 0
    packed = {
        id(weight): in_out_features(module)
        for module in model.modules()
        if (weight := _packed_weight(module)) is not None
    }
    for name, parameter in model.named_parameters():
        if any(part.startswith("lora_") for part in name.split(".")):
            continue
        shape = packed.get(id(parameter))
        total += shape[0] * shape[1] if shape else parameter.numel()
    return total


def check_budget(
    model: nn.Module,
    names: Sequence[str],
    rank: int,
    fraction: float,
    *,
    facts: int = 1,
) -> int:
    """Parameters of a delta, if it may have so many.

    Args:
        names: of the maps in the base model.
        rank: of the update of each.
        fraction: of the base's parameters, for each fact.
        facts: that share the delta.

    Returns:
        The number of its parameters.

    Raises:
        BudgetError: more than `fraction * facts` of the base's. The message says what would fit.
    """
    wanted, base = delta_parameters(model, names, rank), base_parameters(model)
    allowed = int(fraction * base * facts)
    if wanted <= allowed:
        return wanted
    raise BudgetError(
        f"budget: expected at most {allowed} parameters ({fraction:.4%} of the base's {base} for "
        f"each of {facts} facts), got {wanted}: rank {rank} on {len(names)} maps. "
        + _what_fits(model, names, rank, allowed, wanted / (base * facts))
    )


def _what_fits(
    model: nn.Module, names: Sequence[str], rank: int, allowed: int, needed: float
) -> str:
    fitting = []
    lower = allowed // delta_parameters(model, names, 1)
    if lower:
        fitting.append(f"rank {lower} on all of them")
    # As many as fit from the middle outwards, which is where facts are stored best.
    for count in range(len(names) - 1, 0, -1):
        start = (len(names) - count) // 2
        kept = names[start : start + count]
        if delta_parameters(model, kept, rank) <= allowed:
            fitting.append(f"rank {rank} on {count} of them ({', '.join(kept)})")
            break
    # A little more, so that two digits are enough of it.
    fitting.append(f"budget_fraction={1.05 * needed:.2g}")
    return "What fits: " + ", or ".join(fitting)


def _packed_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight of a quantised map whose tensor has other numbers than the map."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not is_linear(module):
        return None
    width_in, width_out = in_out_features(module)
    return weight if weight.numel() != width_in * width_out else None
