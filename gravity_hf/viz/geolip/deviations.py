"""Deviations of the frames against their envelope, and those of random frames beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..drawing import Drawing
from ..style import BLUE, GREY, Theme, new_figure
from .measuring import GeolipSeen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 60


def deviations_figure(seen: GeolipSeen) -> Drawing:
    """How many frames have which deviation, of the model and of as many random frames."""
    title = "Deviation of the frames from uniform angles"

    def build(theme: Theme) -> Figure:
        figure = new_figure(7.6, 4.4, title=title)
        axis = figure.subplots()
        both = torch.cat([seen.deviations, seen.random_deviations])
        most = 1.08 * max(float(both.abs().max()), 1.05 * seen.critical)
        bins = torch.linspace(-most, most, _BINS + 1).numpy()
        share = torch.full_like(seen.random_deviations, 100 / len(seen.random_deviations)).numpy()
        axis.hist(
            seen.random_deviations.numpy(),
            bins,
            weights=share,
            color=GREY,
            alpha=0.55,
            label=_told("random frames, as many", seen.random_deviations, seen.critical),
        )
        axis.hist(
            seen.deviations.numpy(),
            bins,
            weights=share,
            histtype="step",
            color=BLUE,
            linewidth=1.8,
            label=_told("this model", seen.deviations, seen.critical),
        )
        for side in (-1, 1):
            label = f"envelope, ±{seen.critical:.3g}" if side > 0 else None
            where = side * seen.critical
            axis.axvline(where, color=theme.ink, linestyle="--", linewidth=1.0, label=label)
        axis.axvline(0.0, color=theme.ink, linewidth=0.6)
        axis.set_xlim(-most, most)
        axis.set_xlabel("mean angle between rows minus that of uniform directions (radians)")
        axis.set_ylabel("% of the frames")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", fontsize=9)
        return figure

    caption = (
        f"{len(seen.deviations):,} frames. Random frames of the same size lie inside of the "
        f"envelope, too, {_inside(seen.random_deviations, seen.critical):.1f} % of them: to lie "
        "there says that frames did not collapse, and no more."
    )
    return Drawing("deviations", title, caption, build)


def _told(name: str, values: Tensor, critical: float) -> str:
    return (
        f"{name}: {_inside(values, critical):.1f} % inside, mean {float(values.mean()):+.4f}, "
        f"farthest {float(values.abs().max()):.3f}"
    )


def _inside(values: Tensor, critical: float) -> float:
    return 100 * float((values.abs() < critical).double().mean())
