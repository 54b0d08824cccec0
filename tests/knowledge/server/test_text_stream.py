"""Pieces of text: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from typing import Any

import pytest

from gravity_hf.knowledge.server.text_stream import TextStream


def pieces(tokenizer: Any, text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, tokenizer("Tell me about").input_ids, stops)
    found = []
    for token in tokenizer(text).input_ids:
        found.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*found, stream.finish()], stream


@pytest.mark.parametrize("text", [" Paris.", " 中é🌍 and\n more", "", " \ufffd", " 🌍"])
def test_pieces_together_are_the_text(tokenizer: Any, text: str) -> None:
    found, stream = pieces(tokenizer, text)
    assert "".join(found) == stream.text == text


def test_no_piece_has_half_a_character(tokenizer: Any) -> None:
    found, _ = pieces(tokenizer, " é中🌍")
    assert len(tokenizer(" é中🌍").input_ids) > 4
    assert "\ufffd" not in "".join(found)
    assert [piece for piece in found if piece] == [" ", "é", "中", "🌍"]


def test_an_unfinished_character_is_said_at_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [5])
    assert stream.push(tokenizer("🌍").input_ids[0]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("stop", ["boils", " boils at", "at one", "\n\n"])
def test_the_text_ends_before_a_stop_string(tokenizer: Any, stop: str) -> None:
    text = " Water boils at one hundred\n\ndegrees."
    found, stream = pieces(tokenizer, text, ("never", stop))
    assert "".join(found) == stream.text == text.partition(stop)[0]
    assert stream.is_stopped


def test_what_only_begins_like_a_stop_string_is_said(tokenizer: Any) -> None:
    found, stream = pieces(tokenizer, " one hundred degrees", ("hundred days", "degrees!"))
    assert "".join(found) == " one hundred degrees" and not stream.is_stopped
