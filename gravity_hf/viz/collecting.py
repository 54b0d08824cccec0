"""Everything that the figures of a model show, gathered before any of them is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..integration.hosts import gravity_modules
from .clouds import HeadCloud, head_cloud
from .heads import HeadStatistics, measure_heads
from .heatmaps import layer_labels
from .histories import LossPanel, panels_of_results, panels_of_trainer_state
from .maps import compared
from .masses import Masses, masses_by_layer
from .recording import (
    RecordedAttention,
    first_example,
    record_attention,
    record_host_attention,
)
from .tokens import token_labels

EXAMPLE_TOKENS = 24
CLOUD_TOKENS = 256
_PEFT_PREFIX = "base_model.model."
# Relative; less is what saving and loading in another dtype does.
_MOVED = 1e-4


@dataclass(frozen=True, eq=False)
class Measured:
    """What batches are needed for.

    `heads`, `maps`, `host_maps`, `cloud`: see `measure_heads`, `record_attention`,
    `record_host_attention` (None without a host), `head_cloud`. `contrasts`: stages of the model,
    oldest first, `[layers][heads]` each. `chosen`: module and head that are shown alone;
    `picked_by_contrast` where nobody asked for both. `tokens` of the maps, `cloud_tokens` of the
    cloud: labels, none where the model does not read text.
    """

    heads: dict[str, tuple[HeadStatistics, ...]]
    contrasts: dict[str, Masses]
    chosen: tuple[str, int]
    picked_by_contrast: bool
    maps: dict[str, RecordedAttention]
    host_maps: dict[str, RecordedAttention] | None
    tokens: tuple[str, ...]
    cloud: HeadCloud
    cloud_tokens: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class FigureData:
    """What there is to draw.

    `layers`: label of every converted attention module by its name, in order. `masses`: stages of
    the model, oldest first. `panels`: of training. `measured`: None where no batches were given.
    """

    layers: dict[str, str]
    masses: dict[str, Masses]
    panels: tuple[LossPanel, ...] = ()
    measured: Measured | None = None


def collect(
    model: nn.Module,
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    example: Mapping[str, Any] | None = None,
    host: nn.Module | None = None,
    results: Mapping[str, Any] | None = None,
    calibration: Sequence[Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    layer: int | None = None,
    head: int | None = None,
    progress: bool | None = None,
) -> FigureData:
    """Measure a patched model for its figures. Arguments: see `write_figures`.

    Raises:
        RuntimeError: the model has no gravity.
        ValueError: a layer or head that it does not have, a host of another shape, batches that do
            not reach every attention module.
    """
    modules = gravity_modules(model)
    if not modules:
        raise RuntimeError(
            f"write_figures: expected a patched model, got {type(model).__name__} without gravity. "
            "Call patch_with_gravity(model) first, or load one with load_gravity_model"
        )
    layers = dict(zip(modules, layer_labels(list(modules)), strict=True))
    counts = {name: module.query_heads for name, module in modules.items()}
    _check_choice(layers, counts, layer, head)
    masses = _mass_stages(model, modules, calibration)
    panels = _panels(results)
    given = list(batches) if batches is not None else []
    if not given:
        return FigureData(layers, masses, panels)
    heads = measure_heads(model, given, progress=progress)
    chosen = _choose(heads, layers, layer, head)
    shown = first_example(example if example is not None else given[0], EXAMPLE_TOKENS)
    maps = record_attention(model, shown)
    whole = first_example(given[0], CLOUD_TOKENS)
    recorded = record_attention(model, whole, only={chosen[0]})[chosen[0]]
    measured = Measured(
        heads=heads,
        contrasts=_contrast_stages(heads, calibration, "trained" in masses),
        chosen=chosen,
        picked_by_contrast=layer is None or head is None,
        maps=maps,
        host_maps=None if host is None else _host_maps(host, shown, maps),
        tokens=_labels(shown, tokenizer),
        cloud=head_cloud(recorded, chosen[1]),
        cloud_tokens=_labels(whole, tokenizer),
    )
    return FigureData(layers, masses, panels, measured)


def _host_maps(
    host: nn.Module, shown: Mapping[str, Any], maps: Mapping[str, RecordedAttention]
) -> dict[str, RecordedAttention]:
    """The host's, by the names that the gravity model has for the same modules."""
    found = record_host_attention(host, shown)
    missing = [name for name in maps if _plain(name) not in found]
    if missing:
        raise ValueError(
            f"host: expected an attention module {_plain(missing[0])!r} as in the gravity model, "
            f"got {type(host).__name__} without. Give the model that it was made from"
        )
    own = {name: found[_plain(name)] for name in maps}
    for name, weights in own.items():
        compared(maps[name], weights)
    return own


def _check_choice(
    layers: Mapping[str, str], counts: Mapping[str, int], layer: int | None, head: int | None
) -> None:
    if layer is not None and str(layer) not in layers.values():
        known = ", ".join(layers.values())
        raise ValueError(f"layer: expected a converted one of {known}, got {layer}")
    possible = [counts[n] for n, label in layers.items() if layer in (None, int(label))]
    if head is not None and not 0 <= head < max(possible):
        raise ValueError(f"head: expected 0 to {max(possible) - 1}, got {head}")


def _choose(
    heads: Mapping[str, Sequence[HeadStatistics]],
    layers: Mapping[str, str],
    layer: int | None,
    head: int | None,
) -> tuple[str, int]:
    """What was asked for; what was left open by the highest contrast."""
    candidates = [
        one
        for name, row in heads.items()
        for one in row
        if layer in (None, int(layers[name])) and head in (None, one.head)
    ]
    best = max(candidates, key=lambda one: one.contrast)
    return best.layer, best.head


def _panels(results: Mapping[str, Any] | None) -> tuple[LossPanel, ...]:
    if not results:
        return ()
    return (
        panels_of_trainer_state(results) if "log_history" in results else panels_of_results(results)
    )


def _mass_stages(
    model: nn.Module,
    modules: Mapping[str, Any],
    calibration: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Masses]:
    now = masses_by_layer(model)
    settings = next(iter(modules.values())).config
    start = float(nn.functional.softplus(torch.tensor(settings.mass_init)))
    patched = [[start] * len(row) for row in now]
    stages = {"as patched": patched} if _moved(patched, now) else {}
    calibrated = _grid(calibration, modules, "mass")
    if calibrated is None:
        return stages | {"now": now}
    stages["calibrated"] = calibrated
    return stages | ({"trained": now} if _moved(calibrated, now) else {})


def _contrast_stages(
    heads: Mapping[str, Sequence[HeadStatistics]],
    calibration: Sequence[Mapping[str, Any]] | None,
    trained: bool,
) -> dict[str, Masses]:
    """Before training and now; without training both would be the same on two texts."""
    now = [[one.contrast for one in row] for row in heads.values()]
    before = _grid(calibration, heads, "contrast") if trained else None
    return {"now": now} if before is None else {"at calibration": before, "now": now}


def _grid(
    rows: Sequence[Mapping[str, Any]] | None, modules: Iterable[str], key: str
) -> Masses | None:
    """`[layers][heads]` from the rows of a calibration; None where they are of other modules."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows or (), key=lambda row: row["head"]):
        found.setdefault(_plain(row["layer"]), []).append(float(row[key]))
    names = [_plain(name) for name in modules]
    return [found[name] for name in names] if set(names) <= set(found) else None


def _moved(before: Masses, after: Masses) -> bool:
    if [len(row) for row in before] != [len(row) for row in after]:
        return False
    pairs = ((a, b) for rows in zip(before, after, strict=True) for a, b in zip(*rows, strict=True))
    return any(abs(a - b) > _MOVED * abs(a) for a, b in pairs)


def _plain(name: str) -> str:
    """The module's name in the model that peft wraps."""
    return name.removeprefix(_PEFT_PREFIX)


def _labels(inputs: Mapping[str, Any], tokenizer: Any) -> tuple[str, ...]:
    ids = inputs.get("input_ids")
    return () if ids is None else tuple(token_labels(ids[0], tokenizer))
