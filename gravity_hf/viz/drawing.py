"""A figure that can be drawn in any theme, as PNG, as an SVG file, or as SVG inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from .style import INK, PAGE, Theme, drawing_in, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Drawing:
    """What a figure shows, and how it is drawn; nothing is drawn before it is asked for.

    Attributes:
        name: short, for files and for ids in a page.
        title: one line that says what is seen.
        caption: how to read it, in sentences.
        build: draws it; called under the settings of the theme that it is given.
    """

    name: str
    title: str
    caption: str
    build: Callable[[Theme], Figure]

    def files(self, theme: Theme) -> dict[str, bytes]:
        """Contents of a PNG file, at 150 dots per inch, and of an SVG file, by their endings."""
        return self._drawn(theme, ("png", "svg"))

    def svg(self, theme: Theme) -> str:
        """The SVG file alone."""
        return self._drawn(theme, ("svg",))["svg"].decode()

    def inline_svg(self) -> str:
        """The `<svg>` element alone, which takes its ink from the page around it and shares no id
        with a drawing of another name."""
        text = self.svg(PAGE)
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        text = text.replace("<svg ", f'<svg role="img" aria-label="{escape(self.title)}" ', 1)
        return text.replace(INK, "currentColor")

    def _drawn(self, theme: Theme, formats: tuple[str, ...]) -> dict[str, bytes]:
        require_matplotlib()
        found = {}
        with drawing_in(theme, self.name):
            figure = self.build(theme)
            for ending in formats:
                buffer = io.BytesIO()
                # The same figure is the same file, whoever draws it and when.
                plain = {"Date": None} if ending == "svg" else {"Software": None}
                figure.savefig(buffer, format=ending, dpi=_DOTS_PER_INCH, metadata=plain)
                found[ending] = buffer.getvalue()
                # Laid out once: that takes longer than to draw.
                figure.set_layout_engine("none")
        return found
