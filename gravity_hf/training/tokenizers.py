"""A tokenizer whose tokens are bytes, saved like any other, so that AutoTokenizer reads it."""

from __future__ import annotations

from transformers import Qwen2Tokenizer

BYTES = 256


def byte_tokenizer() -> Qwen2Tokenizer:
    """Token i is byte i; byte 0 pads and ends. Text in normal form (NFC) round-trips exactly.

    It is Qwen2's own class without merges: beside a Qwen2 config, AutoTokenizer takes that class
    whatever the folder declares.
    """
    letters = _byte_letters()
    end = letters[0]
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, eos_token=end, pad_token=end)


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte, as GPT-2 introduced it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(BYTES)]
