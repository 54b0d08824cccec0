"""Linear maps of any host in two factors, in place; and such models on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..layers.factorizing import (
    Factors,
    Rank,
    RankRule,
    break_even,
    factors_of,
    output_spectrum,
    rank_rules,
)
from ..layers.input_moments import InputMoments
from ..layers.low_rank import LowRankLinear
from .activation_statistics import input_second_moments
from .factorization_report import FactorizationReport, FactorizedMap
from .factorized_folder import (
    load_factorized,
    mark_factorized,
    ranks_of,
    replace_map,
    save_factorized,
    widths_of,
)
from .own_models import is_own_model

__all__ = ["factorize", "load_factorized", "save_factorized"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def factorize(
    model: PreTrainedModel,
    rank: Rank = "energy:0.95",
    *,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    targets: Iterable[str] | None = None,
    skip: Iterable[str] = ("lm_head",),
    progress: bool | None = None,
) -> FactorizationReport:
    """Replace linear maps of `model`, in place, by the best ones of lower rank in two factors.

    Best on the inputs that `calibration` shows: the outputs change least there. Without it the
    weights change least, which is worse by far where inputs are uneven. It is an approximation,
    with no way back: keep the dense model, measure the loss, and train a little afterwards. Of a
    model patched with gravity the queries and keys change too, and so the distances.

    Args:
        model: a host from transformers, patched with gravity or not, in memory.
        rank: `"energy:0.95"`: of each map the smallest rank that keeps this share of its outputs'
            energy; a whole number: the rank; a fraction: of the rank at which two factors are as
            large as the dense map; ranks by the full name of maps, `report.ranks` of another call
            say: the others stay dense. Where two factors would be no smaller, a map stays dense.
        calibration: texts, or model inputs as dicts of tensors; see `input_second_moments`.
        tokenizer: of the model, for texts.
        targets: names of maps, their last parts (`"q_proj"`, `"mlp.down_proj"`) or patterns
            (`"model.layers.1?.*"`). None: all linear maps.
        skip: of those, which to leave alone.
        progress: True or False; None shows bars on terminals only.

    Returns:
        The report: of each map its rank, the energy kept, parameters and FLOPs.

    Raises:
        TypeError: no PreTrainedModel, or one of this library's own.
        ValueError: what cannot be factorised: a model that is already, or quantised, or with peft
            adapters; a map by name that is tied, sharded or offloaded; names that fit nothing.
            Nothing is changed then.
    """
    _check_model(model)
    skipped = _reasons(model)
    chosen = _chosen(model, skipped, targets, tuple(skip))
    rules = rank_rules(rank, chosen)
    before = _parameters(model)
    moments = None
    if calibration is not None:
        moments = input_second_moments(
            model, chosen, calibration, tokenizer=tokenizer, progress=progress, caller="factorize"
        )
    rows, factors = _plan(chosen, rules, moments, progress)
    for name, two in factors.items():
        layer = replace_map(model, name, two.down.shape[0])
        with torch.no_grad():
            layer.down.weight.copy_(two.down)
            layer.up.weight.copy_(two.up)
    mark_factorized(model, {name: len(two.down) for name, two in factors.items()})
    return FactorizationReport(rows, skipped, before, _parameters(model), moments is not None)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"factorize: expected a PreTrainedModel, got {type(model).__name__}. Of a wrapped "
            "model, pass the one inside"
        )
    if is_own_model(model):
        raise TypeError(
            f"factorize: expected a host from transformers, got {type(model).__name__}. A "
            "LeanFormer has ranks of its own: LeanFormerForCausalLM.from_dense"
        )
    refused = ""
    if ranks_of(model.config) or any(isinstance(m, LowRankLinear) for m in model.modules()):
        refused = (
            "one with maps of low rank, where errors would add up. Start from the dense model, and "
            "factorise before sparsify_feed_forward"
        )
    elif getattr(model, "hf_quantizer", None) is not None:
        refused = "a quantised one. Load it without quantization_config"
    elif getattr(model, "peft_config", None) is not None or any(
        hasattr(m, "base_layer") for m in model.modules()
    ):
        refused = "one with adapters. Factorise first, or merge them: model.merge_and_unload()"
    if refused:
        raise ValueError(f"factorize: expected a dense model in memory, got {refused}")


def _reasons(model: nn.Module) -> dict[str, str]:
    """The linear maps that cannot be replaced, and why."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    reasons = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | Conv1D) or not isinstance(weight, Tensor):
            continue
        others = sorted(owners.get(id(weight), set()) - {f"{name}.weight"})
        if others:
            reasons[name] = f"tied to {others[0]}"
        elif type(module) not in (nn.Linear, Conv1D):
            reasons[name] = f"a {type(module).__name__}, which is more than a linear map"
        elif weight.is_meta:
            reasons[name] = "offloaded: its weight is not in memory"
        elif type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            reasons[name] = f"sharded or packed: its weight is a {type(weight).__name__}"
        elif weight.dtype not in _FLOATS:
            reasons[name] = f"quantised: its weight is of {weight.dtype}"
    return reasons


def _chosen(
    model: nn.Module,
    skipped: dict[str, str],
    targets: Iterable[str] | None,
    skip: tuple[str, ...],
) -> dict[str, nn.Module]:
    """The maps to replace, by name; what `skip` leaves out is entered into `skipped`."""
    if isinstance(targets, str):
        raise ValueError(f"factorize: targets: expected a list, got {targets!r}. Put it in a list")
    patterns = None if targets is None else tuple(targets)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    unknown = [p for p in patterns or () if not any(_fits(name, p) for name in found)]
    if unknown or not found:
        raise ValueError(
            f"factorize: targets: expected names of linear maps, got {unknown}, which fit none. "
            f"The model has {_kinds(found) or 'no linear maps'}"
        )
    chosen: dict[str, nn.Module] = {}
    for name, module in found.items():
        named = patterns is not None and any(_fits(name, p) for p in patterns)
        if patterns is not None and not named:
            continue
        if any(_fits(name, p) for p in skip):
            skipped[name] = "as asked (skip)"
        elif name not in skipped:
            chosen[name] = module
        elif named:
            raise ValueError(
                f"factorize: {name}: expected a linear map of its own in memory, got one that is "
                f"{skipped[name]}. Leave it out of targets"
            )
    if not chosen:
        raise ValueError(
            "factorize: expected linear maps to replace, got none: "
            + "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:4])
        )
    return chosen


def _plan(
    chosen: dict[str, nn.Module],
    rules: Mapping[str, RankRule],
    moments: InputMoments | None,
    progress: bool | None,
) -> tuple[tuple[FactorizedMap, ...], dict[str, Factors]]:
    rows, factors = [], {}
    hidden = None if progress is None else not progress
    for name, module in tqdm(chosen.items(), desc="factorize", unit="map", disable=hidden):
        weight: Tensor = module.weight
        weight = weight.mT if isinstance(module, Conv1D) else weight
        in_features, out_features = widths_of(module)
        try:
            moment = None if moments is None else moments[name].to(weight.device)
            spectrum = output_spectrum(weight, moment)
        except ValueError as error:
            raise ValueError(f"factorize: {name}: {error}") from error
        rank = rules[name].choose(spectrum, in_features, out_features)
        if rank is not None:
            factors[name] = factors_of(weight, spectrum, rank)
        most = break_even(in_features, out_features)
        rows.append(
            FactorizedMap(
                name=name,
                in_features=in_features,
                out_features=out_features,
                bias=module.bias is not None,
                rank=rank,
                energy=1.0 if rank is None else spectrum.kept(rank),
                note="" if rank is not None else f"dense: above rank {most} nothing is saved",
            )
        )
    return tuple(rows), factors


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})[:12])


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
