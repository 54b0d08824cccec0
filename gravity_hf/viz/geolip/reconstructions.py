"""Originals beside reconstructions: images as images, features as curves and cosines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..drawing import Drawing
from ..style import BLUE, ORANGE, Theme, new_figure
from .measuring import GeolipSeen, Pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PICTURES = 8
_MOST_FEATURES = 64
_MOST_POINTS = 4000


def reconstructions_figure(seen: GeolipSeen) -> Drawing:
    """Pictures where there are some, else features."""
    return _features(seen) if seen.pictures is None else _pictures(seen, seen.pictures)


def _pictures(seen: GeolipSeen, pictures: Pictures) -> Drawing:
    title = "Originals beside reconstructions"
    count = min(len(pictures.clean), _MOST_PICTURES)
    named = {"original": pictures.clean, "as given": pictures.given}
    rows = {name: row for name, row in named.items() if row is not None}
    rows["reconstruction"] = pictures.reconstructed

    def build(theme: Theme) -> Figure:
        figure = new_figure(1.1 * count + 1.2, 1.15 * len(rows) + 0.6, "compressed", title=title)
        axes = figure.subplots(len(rows), count, squeeze=False)
        for line, (name, row) in zip(axes, rows.items(), strict=True):
            for axis, picture in zip(line, row[:count], strict=True):
                axis.imshow(_colours(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                for spine in axis.spines.values():
                    spine.set_visible(False)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        return figure

    caption = (
        f"The first {count} images, not chosen. Cosine of all patches, mean "
        f"{float(seen.cosines.mean()):.4f}, lowest {float(seen.cosines.min()):.4f}."
    )
    if pictures.given is not None:
        caption += " As given: with the noise that the model is to take away."
    return Drawing("reconstructions", title, caption, build)


def _colours(picture: Tensor) -> object:
    """`[C, H, W]` in [-1, 1] as matplotlib takes it; of other than one or three channels the first
    alone."""
    shown = (picture.clamp(-1, 1) + 1) / 2
    return (shown.permute(1, 2, 0) if len(shown) == 3 else shown[0]).numpy()


def _features(seen: GeolipSeen) -> Drawing:
    title = "Features beside their reconstructions"
    cosines = seen.cosines
    order = cosines.argsort()
    chosen = {"lowest": order[0], "median": order[len(order) // 2], "highest": order[-1]}

    def build(theme: Theme) -> Figure:
        figure = new_figure(10.0, 5.4, title=title)
        axes = figure.subplot_mosaic(
            [["cloud", name] for name in chosen], width_ratios=(2, 3), sharex=False
        )
        _cloud(axes["cloud"], seen, theme)
        for name, token in chosen.items():
            _curves(axes[name], seen, int(token), name, theme)
        axes["highest"].set_xlabel("feature")
        axes["median"].set_ylabel("normalised value")
        handles, labels = axes["highest"].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower right", ncol=2)
        return figure

    shown = min(seen.targets.shape[1], _MOST_FEATURES)
    caption = (
        f"{len(cosines):,} tokens: cosine of reconstruction and original, mean "
        f"{float(cosines.mean()):.4f}. Beside it the first {shown} of "
        f"{seen.targets.shape[1]} features of the tokens with the lowest, the median and the "
        "highest cosine, normalised as in the loss."
    )
    return Drawing("reconstructions", title, caption, build)


def _cloud(axis: Axes, seen: GeolipSeen, theme: Theme) -> None:
    lengths = seen.targets.norm(dim=-1)
    step = -(-len(lengths) // _MOST_POINTS)
    axis.scatter(
        lengths[::step].numpy(),
        seen.cosines[::step].numpy(),
        s=8,
        alpha=0.45,
        color=BLUE,
        linewidths=0,
    )
    mean = float(seen.cosines.mean())
    axis.axhline(mean, color=theme.ink, linestyle="--", linewidth=1.0)
    place = {"xy": (1.0, mean), "xycoords": ("axes fraction", "data"), "fontsize": 9}
    place |= {"xytext": (0, 3), "textcoords": "offset points"}
    box = {"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    axis.annotate(f"mean {mean:.3f}", ha="right", va="bottom", bbox=box, zorder=4, **place)
    axis.set_xlabel("length of the token's features, normalised")
    axis.set_ylabel("cosine of its reconstruction")
    axis.grid(color=theme.grid)
    axis.set_axisbelow(True)


def _curves(axis: Axes, seen: GeolipSeen, token: int, name: str, theme: Theme) -> None:
    where = torch.arange(min(seen.targets.shape[1], _MOST_FEATURES)).numpy()
    target, output = seen.targets[token, : len(where)], seen.outputs[token, : len(where)]
    axis.plot(where, target.numpy(), color=theme.ink, linewidth=1.0, label="original")
    axis.plot(where, output.numpy(), color=ORANGE, linewidth=1.2, label="reconstruction")
    axis.set_title(f"{name} cosine, {float(seen.cosines[token]):.3f}")
    axis.grid(axis="y", color=theme.grid)
    axis.set_axisbelow(True)
