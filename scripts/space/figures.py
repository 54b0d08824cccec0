"""Attention maps of one head: host, gravity, and what changed. Interactive, for either theme."""

from __future__ import annotations

from html import escape
from typing import Any

import plotly.graph_objects as go
import torch
from pair import Maps
from torch import Tensor

# Both are safe for colour-blind readers; neither needs the page to be light or dark.
_WEIGHTS, _CHANGE = "Viridis", "PuOr_r"
_MOST_LABELS = 24
_HEIGHT = 400
# As shares of a row's attention; between them the scale goes by the root, or the few large weights
# would leave everything else in one colour.
_TICKS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


def attention_figures(maps: Maps, layer: int, head: int) -> tuple[go.Figure, go.Figure, go.Figure]:
    """Host, gravity and gravity minus host; the first two share their scale."""
    host, gravity = maps.host[layer, head], maps.gravity[layer, head]
    most = max(host.max().item(), gravity.max().item(), 1e-6)
    reach = max((gravity - host).abs().max().item(), 1e-4)
    ticks = [tick for tick in _TICKS if tick <= most]
    weights = {
        "colorscale": _WEIGHTS,
        "zmin": 0.0,
        "zmax": most**0.5,
        "colorbar": _bar([t**0.5 for t in ticks], [f"{t:g}" for t in ticks]),
    }
    change = {
        "colorscale": _CHANGE,
        "zmin": -reach,
        "zmax": reach,
        "colorbar": _bar([-reach, 0.0, reach], [f"{-reach:.2g}", "0", f"+{reach:.2g}"]),
    }
    return (
        _map(maps, host, host.sqrt(), "Host: dot product", weights),
        _map(maps, gravity, gravity.sqrt(), "Gravity", weights),
        _map(maps, gravity - host, gravity - host, "Gravity minus host", change),
    )


def _map(maps: Maps, shown: Tensor, color: Tensor, title: str, look: dict[str, Any]) -> go.Figure:
    places = [str(i) for i in range(len(maps.tokens))]
    # Plotly reads tags in labels.
    tokens = [escape(token, quote=False) for token in maps.tokens]
    hidden = torch.zeros_like(shown, dtype=torch.bool)
    if maps.is_causal:
        # A later token is out of sight, which is something else than a weight of 0.
        hidden = torch.ones_like(hidden).triu(1)
    gap = 0.6 if len(tokens) <= _MOST_LABELS else 0.0
    heat = go.Heatmap(
        z=_with_gaps(color, hidden),
        x=places,
        y=places,
        customdata=[
            [[query, key, f"{weight:.3f}"] for key, weight in zip(tokens, row, strict=True)]
            for query, row in zip(tokens, shown.tolist(), strict=True)
        ],
        hovertemplate="%{customdata[0]} → %{customdata[1]}<br>%{customdata[2]}<extra></extra>",
        hoverongaps=False,
        xgap=gap,
        ygap=gap,
        **look,
    )
    step = -(-len(tokens) // _MOST_LABELS)
    labels = {
        "type": "category",
        "tickmode": "array",
        "tickvals": places[::step],
        "ticktext": tokens[::step],
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
        "fixedrange": True,
    }
    figure = go.Figure(heat)
    figure.update_layout(
        template="none",
        height=_HEIGHT,
        title={"text": title, "font": {"size": 15}, "x": 0.0, "xref": "container", "pad": {"l": 8}},
        margin={"l": 8, "r": 8, "t": 38, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(128,128,128,0.12)",
        font={"size": 12},
        hoverlabel={"bgcolor": "#111418", "font": {"color": "#f4f5f7", "size": 13}},
        xaxis={
            **labels,
            "title": {"text": "attended to (key)"},
            "tickangle": -60,
            "automargin": True,
            "constrain": "domain",
            "constraintoward": "left",
        },
        yaxis={
            **labels,
            "title": {"text": "attends (query)"},
            "autorange": "reversed",
            "automargin": True,
            "scaleanchor": "x",
            "constrain": "domain",
            "constraintoward": "top",
        },
    )
    return figure


def _bar(places: list[float], labels: list[str]) -> dict[str, Any]:
    look = {"thickness": 10, "outlinewidth": 0, "len": 0.8, "y": 1.0, "yanchor": "top", "ypad": 0}
    return {**look, "tickvals": places, "ticktext": labels, "tickfont": {"size": 11}}


def _with_gaps(values: Tensor, hidden: Tensor) -> list[list[float | None]]:
    return [
        [None if gap else value for value, gap in zip(row, gaps, strict=True)]
        for row, gaps in zip(values.tolist(), hidden.tolist(), strict=True)
    ]
