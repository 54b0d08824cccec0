"""One page to turn, zoom and point at; it holds all it needs and fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .clouds import HeadCloud
from .heatmaps import Grid
from .maps import GRAVITY, compared
from .recording import RecordedAttention
from .style import ATTENTION_MAP, BLUE, MASS_MAP, ORANGE, Theme, require_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: {scheme}; }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: {paper}; color: {ink};
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.5rem; }}
p {{ max-width: 46rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Interactive:
    """One plotly figure. `name`: its place in the page (`#name`)."""

    name: str
    title: str
    caption: str
    figure: go.Figure


def interactive_page(title: str, figures: Sequence[Interactive], theme: Theme) -> str:
    """An HTML document with plotly.js inside, once."""
    require_plotly()
    parts = []
    for index, shown in enumerate(figures):
        _dress(shown.figure, theme)
        fragment = shown.figure.to_html(
            full_html=False,
            include_plotlyjs=index == 0,
            include_mathjax=False,
            # Of figures without a height; low where the window is narrow.
            default_height="min(820px, 125vw)",
            div_id=f"{shown.name}-plot",
            config={"displaylogo": False, "responsive": True, "showSendToCloud": False},
        )
        heading = f'<h2 id="{shown.name}">{escape(shown.title)}</h2>'
        parts.append(f"<section>{heading}<p>{escape(shown.caption)}</p>{fragment}</section>")
    return _PAGE.format(
        title=escape(title),
        scheme=theme.name,
        paper=theme.paper,
        ink=theme.ink,
        body="\n".join(parts),
    )


def interactive_masses(grid: Grid, layers: Sequence[str], title: str, caption: str) -> Interactive:
    """Masses `[layers][heads]`; the colour is by their logarithm, the number is the mass."""
    import math

    import plotly.graph_objects as go

    logs = [[math.log10(max(mass, 1e-6)) for mass in row] for row in grid]
    ends = [value for row in logs for value in row]
    ticks = [min(ends) + (max(ends) - min(ends)) * i / 4 for i in range(5)]
    map_ = go.Heatmap(
        z=logs,
        customdata=[list(row) for row in grid],
        colorscale=MASS_MAP,
        xgap=1,
        ygap=1,
        hovertemplate="layer %{y}, head %{x}<br>mass M = %{customdata:.4g}<extra></extra>",
        y=[f"{name}" for name in layers],
        colorbar={
            "title": "mass M",
            "tickvals": ticks,
            "ticktext": [f"{10**t:.3g}" for t in ticks],
        },
    )
    figure = go.Figure(map_)
    figure.update_xaxes(title="head", dtick=1 if len(max(grid, key=len)) <= 16 else 4)
    figure.update_yaxes(title="layer", autorange="reversed", type="category")
    figure.update_layout(height=160 + 26 * max(len(grid), 4))
    return Interactive("masses", title, caption, figure)


def interactive_attention(
    gravity: Mapping[str, RecordedAttention],
    host: Mapping[str, RecordedAttention] | None,
    tokens: Sequence[str],
    *,
    pairs: Sequence[tuple[str, int]],
    chosen: tuple[str, int],
    labels: Mapping[str, str],
    title: str,
    caption: str,
) -> Interactive:
    """Maps with the weights at the pointer, one head at a time.

    Args:
        gravity: by name of the attention module, all on one input.
        host: the same of the host, or None: the dot product of gravity's own queries and keys.
        tokens: one label per token.
        pairs: modules and heads that the menu offers.
        chosen: the one of them that is shown first.
        labels: of the modules.
        title, caption: above the figure.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    _, before = compared(gravity[chosen[0]], None if host is None else host[chosen[0]])
    figure = make_subplots(1, 2, subplot_titles=[before, GRAVITY], horizontal_spacing=0.12)
    here = _pair_values(gravity, host, *chosen)
    for column, values in enumerate(here, 1):
        figure.add_trace(
            go.Heatmap(
                z=values,
                coloraxis="coloraxis",
                hovertemplate="query %{y}, key %{x}: %{z:.4f}<extra></extra>",
                hoverongaps=False,
            ),
            1,
            column,
        )
        places = _places(len(values[0]), tokens)
        figure.update_xaxes(**places, title="key token", tickangle=-90, col=column)
        figure.update_yaxes(
            **_places(len(values), tokens), title="query token", autorange="reversed", col=column
        )
    buttons = [
        {
            "label": f"layer {labels[name]}, head {head}",
            "method": "restyle",
            "args": [{"z": list(_pair_values(gravity, host, name, head))}],
        }
        for name, head in pairs
    ]
    menu = {"buttons": buttons, "active": list(pairs).index(chosen), "x": 0, "xanchor": "left"}
    figure.update_layout(
        updatemenus=[menu | {"y": 1.22, "yanchor": "top"}],
        coloraxis={"colorscale": ATTENTION_MAP, "colorbar": {"title": "weight"}},
        height=560,
    )
    return Interactive("attention", title, caption, figure)


def interactive_cloud(
    cloud: HeadCloud, tokens: Sequence[str], title: str, caption: str
) -> Interactive:
    """Queries and keys in space; the area of a key is the attention that it gets."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = [
        list(tokens) if len(tokens) == len(p) else [str(i) for i in range(len(p))]
        for p in (cloud.queries, cloud.keys)
    ]
    _add_points(
        figure,
        cloud.queries,
        name="query",
        text=names[0],
        marker={"size": 3, "symbol": "diamond", "color": ORANGE, "opacity": 0.8},
        hovertemplate="query %{text}, position %{pointNumber}<extra></extra>",
    )
    _add_points(
        figure,
        cloud.keys,
        name="key",
        text=names[1],
        customdata=cloud.received.tolist(),
        # Areas are in points squared; plotly takes diameters.
        marker={"size": cloud.areas.sqrt().tolist(), "color": BLUE, "opacity": 0.55},
        hovertemplate="key %{text}, position %{pointNumber}<br>"
        "attention received %{customdata:.3f}<extra></extra>",
    )
    axes = {
        axis: {"title": {"text": name}, "range": ends}
        for axis, name, ends in zip(
            ("xaxis", "yaxis", "zaxis"), cloud.axis_titles, cloud.limits.tolist(), strict=True
        )
    }
    figure.update_layout(
        # "data": a distance is as long along one axis as along another.
        scene={"aspectmode": "data", **axes},
        scene_camera={"eye": {"x": 1.6, "y": -1.6, "z": 0.8}, "center": {"z": -0.15}},
        legend={"itemsizing": "constant"},
        height=680,
    )
    return Interactive("queries-and-keys", title, caption, figure)


def _add_points(figure: go.Figure, points: Tensor, **look: Any) -> None:
    """Markers at `points` `[N, 3]`; `look`: see plotly's scatter3d."""
    x, y, z = (axis.tolist() for axis in points.T)
    figure.add_scatter3d(x=x, y=y, z=z, mode="markers", **look)


def _pair_values(
    gravity: Mapping[str, RecordedAttention],
    host: Mapping[str, RecordedAttention] | None,
    name: str,
    head: int,
) -> tuple[list[list[float | None]], list[list[float | None]]]:
    own = gravity[name]
    before, _ = compared(own, None if host is None else host[name])
    return _values(before[head], own.visible[head]), _values(own.weights[head], own.visible[head])


def _values(weights: Tensor, visible: Tensor) -> list[list[float | None]]:
    """Four digits are more than a colour shows; hidden keys are gaps."""
    rows = zip(weights.tolist(), visible.tolist(), strict=True)
    return [[round(w, 4) if seen else None for w, seen in zip(*row, strict=True)] for row in rows]


def _places(count: int, tokens: Sequence[str]) -> dict[str, Any]:
    if len(tokens) != count:
        return {}
    return {"tickvals": list(range(count)), "ticktext": list(tokens), "tickfont": {"size": 10}}


def _dress(figure: go.Figure, theme: Theme) -> None:
    margin = {"l": 70, "r": 20, "t": 90 if figure.layout.updatemenus else 30, "b": 60}
    ground = {"backgroundcolor": theme.paper, "gridcolor": theme.grid, "zerolinecolor": theme.grid}
    figure.update_layout(
        template="plotly_dark" if theme.name == "dark" else "plotly_white",
        paper_bgcolor=theme.paper,
        plot_bgcolor=theme.paper,
        font={"color": theme.ink},
        margin=margin | figure.layout.margin.to_plotly_json(),
    )
    if figure.layout.updatemenus:
        figure.update_layout(updatemenus=[{"bgcolor": theme.paper, "font": {"color": theme.ink}}])
    figure.update_scenes(xaxis=ground, yaxis=ground, zaxis=ground)
    # Lines between the cells of a map would show where a gap is meant.
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
