"""The figures of a model, from its data, in the order in which a card shows them."""

from __future__ import annotations

from dataclasses import replace

from .clouds import cloud_figure
from .collecting import FigureData, Measured
from .contrast import contrast_heatmaps
from .curves import score_curves, score_curves_by_layer
from .drawing import Drawing
from .interactive import (
    Interactive,
    interactive_attention,
    interactive_cloud,
    interactive_masses,
)
from .losses import loss_curves
from .maps import attention_grid, attention_pair
from .masses import mass_change, mass_heatmaps

_MOST_PAIRS = 128

_MASSES = (
    "Mass M of every head. A larger mass makes the same difference of distance count for more. "
)
_CONTRAST = (
    "Softened distance d² + ε of a far key (95 % quantile) over that of a near one (5 %), squared. "
    "Under the law “force” by so much steeper does the score fall at the near key; under “power” "
    "its root to the power of M² is the ratio of the two keys' weights. At 1 distance makes no "
    "difference."
)
_TWO_TEXTS = " At calibration: on the text it was calibrated on; now: on the text of these figures."
_CURVES = (
    "Score as a function of squared distance, by the head's own mass and softening. Shaded: where "
    "the pairs of the text lie that the head may attend to."
)
_BY_LAYER = (
    "Each line is a head, from the 5 % to the 95 % quantile of the squared distances that occur; "
    "thick from 25 to 75 %, the dot is the median. The steeper, the more distance matters."
)
_CLOUD = (
    "Three principal components of the head's queries and keys, on axes of one scale; distances "
    "here come as near to those of the law as three dimensions allow. The area of a key is the "
    "attention that it receives, summed over the queries."
)
_LOSSES = (
    "Averaged over a fortieth of the run, at least ten steps, with the logged values behind. As "
    "logged where the run has less than forty steps, or no more than one value per average."
)


def figures_of(data: FigureData) -> list[Drawing]:
    """All that there are data for."""
    found = [_masses(data)]
    if {"calibrated", "trained"} <= set(data.masses):
        title = "How far training moved the mass of every head"
        stages = data.masses["calibrated"], data.masses["trained"]
        change = mass_change(*stages, list(data.layers.values()), title)
        caption = "Trained mass against calibrated mass, in percent of the latter."
        found.append(replace(change, caption=caption))
    if data.measured is not None:
        seen = data.measured
        found += [_contrast(seen, data), *_curves(seen, data), *_maps(seen, data)]
        title = f"Queries and keys of {chosen_label(seen, data)}"
        cloud = cloud_figure(seen.cloud, seen.cloud_tokens, title)
        found.append(replace(cloud, caption=_CLOUD))
    if data.panels:
        has_norms = any(c.gradient_norms for p in data.panels for c in p.curves.values())
        title = "Training: loss and gradient norm" if has_norms else "Training: loss"
        found.append(replace(loss_curves(data.panels, title), caption=_LOSSES))
    return found


def interactive_figures_of(data: FigureData) -> list[Interactive]:
    """Those that gain by turning and pointing."""
    names = list(data.layers.values())
    latest = list(data.masses)[-1]
    title = "Mass of every head" + (f", {latest}" if len(data.masses) > 1 else "")
    found = [interactive_masses(data.masses[latest], names, title, _MASSES.strip())]
    if data.measured is not None:
        seen = data.measured
        maps = interactive_attention(
            seen.maps,
            seen.host_maps,
            seen.tokens,
            chosen=seen.chosen,
            pairs=_pairs(seen),
            labels=data.layers,
            title=f"Attention of {_versus(seen)}",
            caption=f"Choose a layer and a head; point at a cell for its weight.{_whose(seen)}",
        )
        title = f"Queries and keys of {chosen_label(seen, data)}"
        found += [maps, interactive_cloud(seen.cloud, seen.cloud_tokens, title, _CLOUD)]
    return found


def chosen_label(seen: Measured, data: FigureData) -> str:
    """As titles call the head that is shown alone."""
    name, head = seen.chosen
    return f"layer {data.layers[name]}, head {head}"


def _masses(data: FigureData) -> Drawing:
    title = "Mass of every head"
    if len(data.masses) > 1:
        title += ": " + ", ".join(data.masses)
    drawing = mass_heatmaps(data.masses, list(data.layers.values()), title)
    return replace(drawing, caption=(_MASSES + _stages(data)).strip())


def _stages(data: FigureData) -> str:
    words = {
        "as patched": "the constant that every head has before calibration",
        "calibrated": "set from the host's own queries and keys",
        "trained": "after training",
        "now": "as saved",
    }
    known = "; ".join(f"{stage}: {words[stage]}" for stage in data.masses)
    return known[0].upper() + known[1:] + "." if len(data.masses) > 1 else ""


def _contrast(seen: Measured, data: FigureData) -> Drawing:
    title = "How gravitational every head is: its contrast"
    drawing = contrast_heatmaps(seen.contrasts, list(data.layers.values()), title)
    return replace(drawing, caption=_CONTRAST + (_TWO_TEXTS if len(seen.contrasts) > 1 else ""))


def _curves(seen: Measured, data: FigureData) -> list[Drawing]:
    layer = seen.chosen[0]
    return [
        replace(score_curves(seen.heads[layer], data.layers[layer]), caption=_CURVES),
        replace(score_curves_by_layer(seen.heads), caption=_BY_LAYER),
    ]


def _maps(seen: Measured, data: FigureData) -> list[Drawing]:
    name, head = seen.chosen
    own, host = seen.maps[name], None if seen.host_maps is None else seen.host_maps[name]
    what = f"Attention of {_versus(seen)}"
    pair = attention_pair(own, host, head, seen.tokens, f"{what}: {chosen_label(seen, data)}")
    grid = attention_grid(own, host, f"{what}: heads of layer {data.layers[name]}")
    why = " Of those to choose from, this head has the highest contrast."
    gaps = "" if bool(own.visible.all()) else " Gaps are keys that the query may not see."
    text = f"Weight of every key token in every query token's attention.{_whose(seen)}"
    return [
        replace(pair, caption=text + gaps + (why if seen.picked_by_contrast else "")),
        replace(grid, caption=text + " The same text for all heads."),
    ]


def _versus(seen: Measured) -> str:
    return "dot product and gravity" if seen.host_maps is None else "host and gravity"


def _whose(seen: Measured) -> str:
    is_own = seen.host_maps is None
    return " The dot product is that of gravity's own queries and keys." if is_own else ""


def _pairs(seen: Measured) -> list[tuple[str, int]]:
    """Every head of a small model; of a large one those of the chosen layer, and the head with the
    highest contrast of each other one."""
    every = [(name, one.head) for name, row in seen.heads.items() for one in row]
    if len(every) <= _MOST_PAIRS:
        return every
    best = {name: max(row, key=lambda one: one.contrast).head for name, row in seen.heads.items()}
    return [(n, h) for n, h in every if n == seen.chosen[0] or h == best[n]]
