"""Text that others wrote, such as a model or a file, made safe to show on a terminal."""

from __future__ import annotations

import unicodedata

# Turn the direction of writing around: what is seen would not be what is there.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_KEPT = "\n\t"
_PICTURES = 0x2400  # U+2400 + n is the picture of control character n
_DELETE = 0x7F


def terminal_safe(text: str, encoding: str = "utf-8") -> str:
    """`text` without anything that a terminal would obey: control characters become visible.

    Line breaks and tabs stay, a CR LF is a line break. What `encoding` lacks becomes `?`.
    """
    visible = "".join(map(_visible, text.replace("\r\n", "\n")))
    return visible.encode(encoding, "replace").decode(encoding)


def typed_text(line: str) -> str:
    """A line as it was typed, in valid Unicode: bytes that are no UTF-8 become U+FFFD."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _visible(letter: str) -> str:
    if letter in _DIRECTIONS:
        return f"<U+{ord(letter):04X}>"
    if unicodedata.category(letter) != "Cc" or letter in _KEPT:
        return letter
    code = ord(letter)
    if code < 0x20:
        return chr(_PICTURES + code)
    return "\u2421" if code == _DELETE else f"<U+{code:04X}>"
