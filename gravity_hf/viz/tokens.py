"""Tokens as labels: short, one line each, in letters that the figure's font has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axis import Axis

_LONGEST = 14
_MOST_LABELS = 40
_SPACE, _NEWLINE = "·", "↵"


def token_labels(ids: Tensor | Sequence[int], tokenizer: Any = None) -> list[str]:
    """One label per id `[T]`; positions where there is no tokenizer. A space before a word is `·`,
    a line break `↵`; letters that the font lacks are written as U+..."""
    numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if tokenizer is None:
        return [str(position) for position in range(len(numbers))]
    return [token_label(tokenizer.decode([number])) for number in numbers]


def token_label(text: str) -> str:
    """Of one token's text, short, in letters that the figure's font has."""
    has = _drawable()
    text = "".join(c if has(c) else f"U+{ord(c):04X}" for c in _visible_space(text))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def visible_token(text: str) -> str:
    """One token's text in one line, whole, for a page, which has letters of every kind."""
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in _visible_space(text))


def set_token_labels(axis: Axis, tokens: Sequence[str] | int, **look: Any) -> None:
    """A tick for every token, or positions for a number of tokens; every second or third where
    there would be too many."""
    labels = [str(i) for i in range(tokens)] if isinstance(tokens, int) else list(tokens)
    step = -(-len(labels) // _MOST_LABELS)
    places = range(0, len(labels), step)
    axis.set_ticks(list(places), [labels[i] for i in places], fontsize=7.5, **look)
    for text in axis.get_ticklabels():
        # A dollar sign in a token is no formula.
        text.set_parse_math(False)


def _visible_space(text: str) -> str:
    text = text.replace("\r\n", _NEWLINE).replace("\n", _NEWLINE).replace("\t", "→")
    return text.replace(" ", _SPACE) or "∅"


@functools.cache
def _drawable() -> Callable[[str], bool]:
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return lambda letter: ord(letter) in known and letter.isprintable()
