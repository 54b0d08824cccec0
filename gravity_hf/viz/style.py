"""Figures as SVG text that takes its ink from the page around it, so it reads on light and dark."""

from __future__ import annotations

import functools
import importlib.util
import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Replaced by `currentColor` in the SVG: matplotlib itself knows no such colour.
INK = "#0a0b0c"
COLORS = ("#7a8594", "#d1495b", "#c98a1b", "#1f9d8b", "#5b7fd6", "#9b6bc9")

_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def require_matplotlib() -> None:
    """Fail before long work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install 'gravity_hf[viz]'"
        )


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches; no pyplot, so no window system and no global state."""
    require_matplotlib()
    from matplotlib.figure import Figure

    with _style():
        return Figure(figsize=(width, height), layout="constrained")


def figure_svg(figure: Figure, name: str, description: str) -> str:
    """The `<svg>` element alone. `name` keeps ids apart when a page holds several figures."""
    buffer = io.StringIO()
    with _style(name):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    return text.replace(INK, "currentColor")


def styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Run a drawing function under the shared style."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> str:
        require_matplotlib()
        with _style():
            return draw(*args, **kwargs)

    return wrapper


def _style(salt: str = "gravity") -> AbstractContextManager[Any]:
    import matplotlib

    return matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt})
