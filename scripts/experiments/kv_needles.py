"""Needles for `kv_cache.py`: a line in the middle of a window, which its end asks for again."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

import torch

NEEDLE_LETTERS = 12


def with_needle(
    window: torch.Tensor, ids_of: Callable[[str], list[int]], generator: random.Random
) -> tuple[torch.Tensor, int]:
    """`window` with a needle in its middle and again at its end, as long as before, and how many
    tokens at the end are the needle asked for: its opening and its letters."""
    name = "".join(generator.choices(string.ascii_uppercase, k=6))
    letters = "".join(generator.choices(string.ascii_lowercase, k=NEEDLE_LETTERS))
    opening = f"\n{name} = '"
    line = torch.tensor(ids_of(f"{opening}{letters}'\n"))
    question = torch.tensor(ids_of(f"{opening}{letters}"))
    middle = len(window) // 2
    before, after = window[: middle - len(line)], window[middle : len(window) - len(question)]
    return torch.cat([before, line, after, question]), len(question)


def copied(logits: torch.Tensor, question: torch.Tensor) -> int:
    """How many of the letters at the end of `question` `[n]` are the likeliest token of `logits`
    `[n - 1, V]` after the tokens before them."""
    best = logits[-NEEDLE_LETTERS:].argmax(-1)
    return int((best == question[-NEEDLE_LETTERS:]).sum())
