"""Prompts and answers as token ids, whatever the tokenizer puts before a text.

The ids of an answer are what is left of the ids of prompt and answer together after those of the
prompt. Tokenising the answer by itself is wrong twice: many tokenizers begin every text with a
token of their own, so that its first id is the same for all answers, and a word after a space is
another token than the word alone.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from .errors import ValidationError

_SPACES = " \t"


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids that a model reads before it answers.

    With what the tokenizer puts before a text (BOS, where its model is used with one) and without
    what it puts after it. Spaces at the end are left out: they belong to the answer's first token.

    Args:
        tokenizer: any transformers tokenizer.

    Raises:
        ValidationError: no ids are left.
    """
    before = _special_before(tokenizer)
    ids = before + _plain_ids(tokenizer, prompt.rstrip(_SPACES))
    if not ids:
        raise ValidationError(f"prompt: expected text that has tokens, got {prompt!r}")
    return ids


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """The ids of `answer` after `prompt`: `prompt_ids(prompt) + answer_ids` is the whole text.

    Args:
        tokenizer: any transformers tokenizer.
        prompt: where it ends in white space the answer follows at once, else after one space.
        answer: written without a space before it.

    Raises:
        ValidationError: the tokenizer has no token for a part of the answer, or one token for the
            end of the prompt and the beginning of the answer.
    """
    text = joined(prompt, answer)
    head = _plain_ids(tokenizer, prompt.rstrip(_SPACES))
    whole = _plain_ids(tokenizer, text)
    if whole[: len(head)] != head:
        raise ValidationError(
            f"answer {answer!r}: expected tokens that begin where the prompt {prompt!r} ends, got "
            "one that holds the end of the prompt too. End the prompt with a whole word"
        )
    ids = whole[len(head) :]
    _check_decodes(tokenizer, ids, answer)
    return ids


def joined(prompt: str, answer: str) -> str:
    """Prompt and answer as one text."""
    return prompt + answer if prompt[-1:].isspace() else f"{prompt} {answer}"


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _special_before(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself."""
    plain = _plain_ids(tokenizer, "a")
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ValidationError(
        f"{type(tokenizer).__name__}: expected the same ids with and without special tokens, apart "
        f"from those, got {full} and {plain}"
    )


def _check_decodes(tokenizer: Any, ids: list[int], answer: str) -> None:
    """A special token as an answer (BOS, unknown) would be taught, and every test would pass."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""
    special = set(tokenizer.all_special_ids).intersection(ids)
    if special or _letters(text) != _letters(answer):
        raise ValidationError(
            f"answer {answer!r}: expected tokens that spell it, got {ids}, which are {text!r}. "
            f"{type(tokenizer).__name__} cannot write it: reword the answer"
        )


def _letters(text: str) -> str:
    """For tokenizers that change case or spaces."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
