"""Coordinates of tokens as a picture of one layer, and as a figure with all layers to turn."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .coordinates import Coordinates, Projection, weighed
from .drawing import Drawing
from .interactive import Interactive
from .space import set_axes, write_names
from .style import GREY, MASS_MAP, Theme, new_figure
from .tokens import token_label, visible_token

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d import Axes3D

NAME = "coordinates"
# Areas of markers: points squared in the picture, pixels squared on the page.
_AREAS, _PIXELS = (12.0, 260.0), (25.0, 500.0)
_ALL_LAYERS = (
    "Three principal components, the same directions in all layers, each layer minus its mean: a "
    "common shift changes no distance. In brackets the share of the variance of the layer shown. "
    "Size and colour: mass."
)
_TO_TURN = " Point at a token for its text; the slider goes through the layers."


def coordinate_picture(
    coordinates: Coordinates, projection: Projection, layer: int | None = None
) -> Drawing:
    """Where the tokens are after one layer, by its number; the last one if None.

    ValueError for a layer that is not there.
    """
    last = len(coordinates.layers) - 2
    if layer is not None and not 0 <= layer <= last:
        raise ValueError(f"layer: expected 0 to {last}, got {layer}")
    number = last if layer is None else layer
    chosen = number + 1
    title = f"Coordinates of {len(coordinates.tokens)} tokens after layer {number}"
    points, masses = projection.points[chosen], coordinates.masses

    def build(theme: Theme) -> Figure:
        figure = new_figure(7.8, 6.2, title=title)
        axis: Axes3D = figure.add_subplot(projection="3d")
        axis.computed_zorder = False
        dots = axis.scatter(
            *points.T.numpy(),
            s=weighed(masses, *_AREAS).numpy(),
            c=masses.numpy(),
            cmap=MASS_MAP,
            alpha=0.85,
            edgecolors=theme.ink,
            linewidths=0.3,
            label="token; size and colour: mass",
        )
        names = {i: token_label(text) for i, text in enumerate(coordinates.tokens)}
        write_names(axis, points, masses, names, theme.paper)
        set_axes(axis, projection.axis_titles(chosen), projection.limits)
        bar = figure.colorbar(dots, ax=axis, shrink=0.6, pad=0.1)
        bar.set_label("mass m")
        axis.legend(loc="upper left", fontsize=8.5)
        return figure

    return Drawing(NAME, title, _ALL_LAYERS, build)


def coordinate_slider(coordinates: Coordinates, projection: Projection) -> Interactive:
    """All layers: markers that can be pointed at, and a slider."""
    import plotly.graph_objects as go

    last = len(coordinates.layers) - 1
    shown = _Shown(coordinates, projection)
    places = shown.places(last)
    path = go.Scatter3d(
        **places,
        mode="lines",
        name="order of the text (click)",
        line={"color": GREY, "width": 2},
        hoverinfo="skip",
        visible="legendonly",
        showlegend=True,
    )
    markers = go.Scatter3d(**places, **_look(shown), mode="markers", showlegend=False)
    figure = go.Figure([path, markers])
    figure.update_layout(
        scene={"aspectmode": "data", **_axes(projection, last)},
        scene_camera={"eye": {"x": 1.55, "y": -1.55, "z": 0.85}, "center": {"z": -0.12}},
        margin={"l": 0, "r": 0, "t": 30},
        legend={"x": 0, "y": 1, "xanchor": "left", "yanchor": "top"},
        sliders=[_slider(shown, last)],
        uirevision="keep the view",
    )
    title = f"Coordinates of {len(coordinates.tokens)} tokens in every layer"
    return Interactive(NAME, title, _ALL_LAYERS + _TO_TURN, figure)


class _Shown:
    """Numbers as short as the eye needs them."""

    def __init__(self, coordinates: Coordinates, projection: Projection) -> None:
        self.projection = projection
        self.masses = _rounded(coordinates.masses)
        self.sizes = _rounded(weighed(coordinates.masses, *_PIXELS).sqrt())
        self.hovers = [
            [escape(visible_token(text)), position, f"{mass:.4g}"]
            for position, (text, mass) in enumerate(
                zip(coordinates.tokens, self.masses, strict=True)
            )
        ]

    def places(self, layer: int) -> dict[str, list[float]]:
        columns = self.projection.points[layer].T
        return {axis: _rounded(column) for axis, column in zip("xyz", columns, strict=True)}


def _look(shown: _Shown) -> dict[str, Any]:
    """Of the markers, and of what they say."""
    # Below the scene: beside it there would be no room for one in a narrow window.
    bar = {"title": {"text": "mass m", "side": "top"}, "orientation": "h", "len": 0.6}
    bar |= {"thickness": 10, "y": 0, "yanchor": "top"}
    return {
        "customdata": shown.hovers,
        "hovertemplate": "%{customdata[0]}<br>position %{customdata[1]}, mass %{customdata[2]}<br>"
        "PC1 %{x}, PC2 %{y}, PC3 %{z}<extra></extra>",
        "marker": {
            "size": shown.sizes,
            "color": shown.masses,
            "colorscale": MASS_MAP,
            "colorbar": bar,
            "opacity": 0.85,
            "line": {"width": 0},
        },
    }


def _axes(projection: Projection, layer: int) -> dict[str, Any]:
    found = zip("xyz", projection.axis_titles(layer), projection.limits.tolist(), strict=True)
    plain = {"zeroline": False, "showspikes": False}
    return {f"{a}axis": {"title": {"text": t}, "range": ends, **plain} for a, t, ends in found}


def _slider(shown: _Shown, active: int) -> dict[str, Any]:
    """Each step moves both traces and says how much of its layer the axes show."""
    steps = []
    for layer in range(len(shown.projection.points)):
        places = {axis: [values] * 2 for axis, values in shown.places(layer).items()}
        titles = shown.projection.axis_titles(layer)
        layout = {f"scene.{axis}axis.title.text": t for axis, t in zip("xyz", titles, strict=True)}
        label = f"after layer {layer - 1}" if layer else "before layer 0"
        steps.append({"label": label, "method": "update", "args": [places, layout, [0, 1]]})
    return {
        "steps": steps,
        "active": active,
        "currentvalue": {"font": {"size": 15}},
        "pad": {"l": 40, "r": 40, "t": 70, "b": 30},
    }


def _rounded(values: Tensor | Sequence[float]) -> list[float]:
    numbers = values.tolist() if isinstance(values, Tensor) else values
    return [float(f"{number:.4g}") for number in numbers]
