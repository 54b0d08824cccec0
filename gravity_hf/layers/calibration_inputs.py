"""Texts or batches, as callers have them, as model inputs to measure a model on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Tokens of a text that are read, where the caller has not cut it.
LENGTH = 512
_READ = ("input_ids", "attention_mask")


def calibration_batches(
    caller: str, calibration: Iterable[Any], tokenizer: Any = None, *, length: int = LENGTH
) -> list[dict[str, Any]]:
    """Model inputs by name.

    Args:
        caller: the function that errors name.
        calibration: texts, each a batch of one row of at most `length` tokens; or model inputs as
            mappings of tensors, which are taken as they are.
        tokenizer: of the model, for texts.

    Raises:
        ValueError: nothing, one text by itself, texts without a tokenizer, or other things.
    """
    if isinstance(calibration, str | Mapping):
        kind = "one text" if isinstance(calibration, str) else "one batch"
        raise ValueError(f"{caller}: calibration: expected a list, got {kind}. Put it in a list")
    given = list(calibration)
    if not given:
        raise ValueError(f"{caller}: calibration: expected texts or batches, got none")
    batches = []
    for item in given:
        if isinstance(item, Mapping):
            batches.append(dict(item))
        elif not isinstance(item, str):
            raise ValueError(
                f"{caller}: calibration: expected texts, or model inputs by name such as "
                f"{{'input_ids': ...}}, got a {type(item).__name__}"
            )
        elif tokenizer is None:
            raise ValueError(
                f"{caller}: tokenizer: expected the model's, to read texts with, got none. Pass "
                "tokenizer=AutoTokenizer.from_pretrained(...)"
            )
        else:
            read = tokenizer(item, truncation=True, max_length=length, return_tensors="pt")
            if read["input_ids"].numel():
                batches.append({k: v for k, v in read.items() if k in _READ})
    if not batches:
        raise ValueError(f"{caller}: calibration: expected texts with a token in them, got none")
    return batches
