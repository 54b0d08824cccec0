"""Attention maps, host beside gravity: which token attends to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .drawing import Drawing
from .recording import RecordedAttention
from .style import ATTENTION_MAP, Theme, change_map, new_figure
from .tokens import set_token_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_HEADS = 12
HOST, GRAVITY, DOT_PRODUCT = "host", "gravity", "dot product"


def attention_pair(
    gravity: RecordedAttention,
    host: RecordedAttention | None,
    head: int,
    tokens: Sequence[str],
    title: str,
) -> Drawing:
    """One head: the host's weights, gravity's, and the difference.

    Args:
        gravity: of one attention module of the gravity model.
        host: of the same module of its host, on the same input; without one gravity is compared
            with the dot product of its own queries and keys.
        head: query head.
        tokens: one label per token.
        title: above everything.
    """
    before, name = compared(gravity, host)

    def build(theme: Theme) -> Figure:
        from matplotlib.colors import Normalize, PowerNorm

        visible = gravity.visible[head]
        first, second = (_hidden(w[head], visible).numpy() for w in (before, gravity.weights))
        queries, keys = visible.shape
        size = min(max(0.165 * max(queries, keys), 2.4), 6.5)
        height = size * queries / max(keys, 1) + 1.5
        figure = new_figure(3 * size + 3.4, height, "compressed", title=title)
        axes = figure.subplots(1, 3)
        most = max(float(before[head].max()), float(gravity.weights[head].max()), 1e-6)
        # By the root, or the few large weights would leave everything else in one colour.
        norm = PowerNorm(0.5, 0.0, most)
        for axis, values, what in ((axes[0], first, name), (axes[1], second, GRAVITY)):
            mesh = axis.imshow(values, cmap=ATTENTION_MAP, norm=norm, interpolation="nearest")
            axis.set_title(what)
        _bar(figure, mesh, axes[:2], "attention weight (root scale)")
        change = second - first
        reach = max(float(np.nanmax(np.abs(change), initial=0.0)), 1e-6)
        mesh = axes[2].imshow(
            change, cmap=change_map(theme), norm=Normalize(-reach, reach), interpolation="nearest"
        )
        axes[2].set_title(f"{GRAVITY} minus {name}")
        _bar(figure, mesh, [axes[2]], "difference of weights")
        for index, axis in enumerate(axes):
            _label(axis, tokens, queries, keys, with_queries=index == 0)
        return figure

    return Drawing("attention", title, "", build)


def attention_grid(
    gravity: RecordedAttention, host: RecordedAttention | None, title: str
) -> Drawing:
    """All heads of one module, host above gravity; of more than 12, 12 evenly spaced ones."""
    before, name = compared(gravity, host)
    count = gravity.weights.shape[0]
    heads = torch.linspace(0, count - 1, min(count, _MOST_HEADS)).round().long().tolist()

    def build(theme: Theme) -> Figure:
        from matplotlib.colors import PowerNorm

        columns = min(len(heads), 6)
        bands = -(-len(heads) // columns)
        width, height = 1.75 * columns + 1.6, 3.6 * bands + 0.9
        figure = new_figure(width, height, "compressed", title=title)
        axes = figure.subplots(2 * bands, columns, squeeze=False)
        most = max(float(before.max()), float(gravity.weights.max()), 1e-6)
        for axis in axes.flat:
            axis.set_visible(False)
        for place, head in enumerate(heads):
            band, column = divmod(place, columns)
            for row, weights in enumerate((before, gravity.weights)):
                axis = axes[2 * band + row][column]
                axis.set_visible(True)
                values = _hidden(weights[head], gravity.visible[head]).numpy()
                mesh = axis.imshow(
                    values,
                    cmap=ATTENTION_MAP,
                    norm=PowerNorm(0.5, 0.0, most),
                    interpolation="nearest",
                )
                axis.set(xticks=[], yticks=[])
                _no_frame(axis)
                if row == 0:
                    axis.set_title(f"head {head}", fontsize=9)
                if column == 0:
                    axis.set_ylabel(name if row == 0 else GRAVITY)
        _bar(figure, mesh, axes, "attention weight (root scale)")
        figure.supxlabel("key token (first on the left)", fontsize=9.5)
        figure.supylabel("query token (first on top)", fontsize=9.5)
        return figure

    return Drawing("attention-heads", title, "", build)


def compared(gravity: RecordedAttention, host: RecordedAttention | None) -> tuple[Tensor, str]:
    """Weights `[H, Tq, Tk]` that gravity's are compared with, and whose they are.

    Raises:
        ValueError: a host of other heads or another input.
    """
    if host is None:
        return gravity.dot_product, DOT_PRODUCT
    if host.weights.shape != gravity.weights.shape:
        raise ValueError(
            f"host: expected attention weights [heads, queries, keys] of "
            f"{tuple(gravity.weights.shape)} as in the gravity model, got "
            f"{tuple(host.weights.shape)}. Give the model that it was made from, and the same text"
        )
    return host.weights, HOST


def _hidden(weights: Tensor, visible: Tensor) -> Tensor:
    """Hidden keys as gaps: a weight of 0 that could have been another is something else."""
    return weights.masked_fill(~visible, float("nan"))


def _label(axis: Axes, tokens: Sequence[str], queries: int, keys: int, with_queries: bool) -> None:
    set_token_labels(axis.xaxis, tokens if len(tokens) == keys else keys, rotation=90)
    set_token_labels(axis.yaxis, tokens if len(tokens) == queries else queries)
    axis.set_xlabel("key token")
    axis.set_ylabel("query token" if with_queries else "")
    if not with_queries:
        axis.set_yticklabels([])
    axis.tick_params(length=0)
    _no_frame(axis)


def _no_frame(axis: Axes) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)


def _bar(figure: Figure, mesh: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.035, aspect=28)
    bar.outline.set_visible(False)
    bar.set_label(label)
