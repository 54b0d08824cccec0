"""How a geolip was trained, as its record says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_words import counted

_ROWS = {"features": "text", "images": "image"}


def recipe(facts: dict[str, Any]) -> list[str]:
    """How it was trained, where that is recorded."""
    training = facts["training"]
    if training is None:
        return ["How it was made is not recorded in this folder; all else is read from its files."]
    row = _ROWS.get(training["task"], "row")
    lines = [
        f"Trained from nothing, seed {training['seed']}: {counted(training['steps'], 'step')} of "
        f"{counted(training['batch_size'], row)}, drawn from {training['rows']:,}; "
        f"{training['held_out_rows']:,} were held out"
        f"{'; in bfloat16' if training['bf16'] else ''}.",
        f"{training['optimizer']}; learning rate {training['learning_rate']:g} after "
        f"{counted(training['warmup_steps'], 'step')} of warmup, then a {training['schedule']}.",
        f"Data: {training['data']}.",
    ]
    if training["denoise"]:
        lines.insert(
            2,
            f"Normal noise of deviation {training['denoise']:g} was added to the input, which it "
            "learned to take away; the verdict is of noisy inputs, too.",
        )
    return lines


def host_of(config: Mapping[str, Any] | None) -> str | None:
    """Whose features these are, and of which layer, in words; None where it is not recorded.

    Args:
        config: `GeolipConfig.host_config`.
    """
    named = (config or {}).get("name_or_path")
    if not named:
        return None
    layer = (config or {}).get("layer")
    which = "" if layer is None else ", the last layer" if layer == -1 else f", layer {layer}"
    return f"`{named}`{which}"
