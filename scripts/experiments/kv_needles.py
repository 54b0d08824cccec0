"""Needles for `kv_cache.py`: a line in the middle of a window, which its end asks for again."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

import torch

NEEDLE_LETTERS = 12


def with_needle(
    window: torch.Tensor, ids_of: Callable[[str], list[int]], generator: random.Random
) -> tuple[torch.Tensor, int, int]:
    """`window` with a needle in its middle and again at its end, as long as before; how many tokens
    at the end are the needle asked for, its opening and its letters; and how many the letters
    alone. The tokens are the same at both places: no token crosses a seam."""
    name = "".join(generator.choices(string.ascii_uppercase, k=6))
    letters = ids_of("".join(generator.choices(string.ascii_lowercase, k=NEEDLE_LETTERS)))
    question = [*ids_of(f"\n{name} = '"), *letters]
    line = torch.tensor([*question, *ids_of("'\n")])
    middle = len(window) // 2
    before, after = window[: middle - len(line)], window[middle : len(window) - len(question)]
    return torch.cat([before, line, after, torch.tensor(question)]), len(question), len(letters)


def copied(logits: torch.Tensor, question: torch.Tensor, letters: int) -> int:
    """How many of the `letters` tokens at the end of `question` `[n]` are the likeliest token of
    `logits` `[n - 1, V]` after the tokens before them."""
    return int((logits[-letters:].argmax(-1) == question[-letters:]).sum())
