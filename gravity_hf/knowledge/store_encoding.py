"""Facts for a store: what `add` is given, as a `Fact`; its encoding with the store's settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import ValidationError
from .facts import Fact
from .history import check_key

if TYPE_CHECKING:
    from .encoding import EncodedBelief


def fact_of(
    prompt: str | Fact, answer: str | None, key: str | None, **fields: Sequence[str] | str
) -> Fact:
    """A whole fact as it is, or one made of a prompt, its answer and the other `fields`."""
    if isinstance(prompt, Fact):
        if answer is not None or any(fields.values()):
            raise ValidationError(
                "add: expected a Fact alone, or a prompt with its answer and the rest, got both. "
                "Change the fact with dataclasses.replace"
            )
        return prompt
    if not isinstance(answer, str) or not answer:
        raise ValidationError(f"add: expected an answer to {prompt!r:.80}, got {answer!r}")
    name = check_key(key or key_of(prompt))
    values = {n: v if isinstance(v, str) else tuple(v) for n, v in fields.items()}
    domain = name.rpartition("/")[0]
    return Fact(name, domain, "", "", prompt, answer, **values)  # type: ignore[arg-type]


def key_of(prompt: str) -> str:
    """Readable, and another for every prompt."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return "-".join([*words[:8], digest])


def encoded(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    settings: Mapping[str, Any],
    changes: Mapping[str, Any],
    progress: bool,
) -> list[EncodedBelief]:
    """One delta for each fact, trained together.

    Args:
        settings: of the store, `EncodingConfig.to_dict()`; changes: for these facts alone.

    Raises:
        ValidationError, BudgetError: see `BeliefEncoder.encode`; and without a tokenizer.
    """
    from .encoding import BeliefEncoder
    from .encoding_config import EncodingConfig

    if tokenizer is None:
        raise ValidationError(
            "add: expected a store with a tokenizer, got None: facts are text. Open the store with "
            "the base's tokenizer"
        )
    config = EncodingConfig.from_dict(dict(settings)).with_changes(**changes)
    return BeliefEncoder(model, tokenizer, config).encode(facts, progress)
