"""How figures look: themes, colours, and a figure without pyplot.

Colours are told apart by people with any common colour blindness, and stand out from white and from
dark paper alike (at least 3 to 1, WCAG 2.2 criterion 1.4.11).
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """`ink` for text and axes, `paper` behind them ("none" leaves it to the page), `grid` for lines
    that help the eye. `span` is the part of a colour map whose colours stand out as lines.
    `changes`: colours from far below nothing over nothing to far above it."""

    name: str
    ink: str
    paper: str
    grid: str
    span: tuple[float, float]
    changes: tuple[str, ...]


_ON_LIGHT = ("#7a3300", "#d97f2e", "#ededf0", "#4c9ad0", "#0b4a7d")
_ON_DARK = ("#ffb870", "#c2651c", "#2b3038", "#2f7fb8", "#93d2ff")
LIGHT = Theme("light", "#1b1f24", "#ffffff", "#d8dbe0", (0.0, 0.58), _ON_LIGHT)
DARK = Theme("dark", "#e6edf3", "#14171c", "#3a4048", (0.42, 1.0), _ON_DARK)
# For SVG inside a page. Replaced by `currentColor` there: matplotlib itself knows no such colour.
INK = "#0a0b0c"
PAGE = Theme("page", INK, "none", "#8a919c", (0.42, 0.58), _ON_LIGHT)
THEMES = {"light": (LIGHT,), "dark": (DARK,), "both": (LIGHT, DARK)}

# Grey first: it is for what others are compared with. After Okabe and Ito (2008), darkened.
GREY, BLUE, ORANGE, GREEN, PURPLE, AMBER = COLORS = (
    "#7a8594",
    "#1f83c4",
    "#d55e00",
    "#0a9070",
    "#b8629a",
    "#a87400",
)
# Each rises evenly in lightness, so it also reads in grey.
MASS_MAP, CONTRAST_MAP, ATTENTION_MAP, LINE_MAP = "viridis", "cividis", "viridis", "viridis"

_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "grid.linewidth": 0.6,
    "figure.titlesize": 12,
}
_INKED = (
    "text.color",
    "axes.edgecolor",
    "axes.labelcolor",
    "axes.titlecolor",
    "xtick.color",
    "ytick.color",
)
_PAPERED = (
    "figure.facecolor",
    "axes.facecolor",
    "savefig.facecolor",
    "axes3d.xaxis.panecolor",
    "axes3d.yaxis.panecolor",
    "axes3d.zaxis.panecolor",
)
# Inches, on both sides together.
_TITLE_MARGINS = 0.3
# matplotlib's settings belong to the process; threads of a server draw one after the other.
_turn = threading.RLock()


def themes_of(name: str) -> tuple[Theme, ...]:
    """The themes that "light", "dark" or "both" stands for."""
    if name not in THEMES:
        raise ValueError(f"theme: expected one of {list(THEMES)}, got {name!r}")
    return THEMES[name]


def require_matplotlib() -> None:
    """Fail before long work, not after it."""
    _require("matplotlib", "figures")


def require_plotly() -> None:
    """Fail before long work, not after it."""
    _require("plotly", "interactive figures")


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{what} need {package}, which is not installed: pip install 'gravity_hf[viz]'"
        )


@contextmanager
def drawing_in(theme: Theme, salt: str = "gravity") -> Iterator[None]:
    """matplotlib's settings of a theme, as they were afterwards. `salt` makes ids of SVG."""
    import matplotlib

    settings: dict[str, Any] = {**_SETTINGS, "svg.hashsalt": salt}
    settings |= dict.fromkeys(_INKED, theme.ink) | dict.fromkeys(_PAPERED, theme.paper)
    settings["grid.color"] = theme.grid
    with _turn, matplotlib.rc_context(settings):
        yield


def new_figure(
    width: float, height: float, layout: str = "constrained", *, title: str | None = None
) -> Figure:
    """An empty figure in inches, wider where its title needs that; no pyplot, so no window system
    and nothing global. Panels of fixed proportions sit close together in the layout
    "compressed"."""
    from matplotlib.figure import Figure

    if not title:
        return Figure(figsize=(width, height), layout=layout)
    figure = Figure(figsize=(max(width, _title_width(title)), height), layout=layout)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _title_width(title: str) -> float:
    """Inches that a title takes up, and the margins beside it, in the settings of `drawing_in`."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    size = rcParams["figure.titlesize"]
    font = FontProperties(size=size, weight=rcParams["figure.titleweight"])
    lines = (text_to_path.get_text_width_height_descent(t, font, False) for t in title.split("\n"))
    return max(width for width, _, _ in lines) / 72 + _TITLE_MARGINS


def line_map(theme: Theme) -> LinearSegmentedColormap:
    """The colours for many lines in order, those aside that the theme's paper would swallow."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    start, end = theme.span
    colors = [colormaps[LINE_MAP](start + (end - start) * i / 31) for i in range(32)]
    return LinearSegmentedColormap.from_list(f"lines-{theme.name}", colors)


def change_map(theme: Theme) -> LinearSegmentedColormap:
    """Orange below nothing, blue above it, and near the paper where nothing changed."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(f"changes-{theme.name}", theme.changes)
