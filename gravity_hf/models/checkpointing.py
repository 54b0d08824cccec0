"""Gradient checkpointing of models whose layers share what has a gradient."""

from __future__ import annotations

from typing import Any


def refuse_reentrant(
    arguments: tuple[Any, ...], options: dict[str, Any], shared: str = "one table of distances"
) -> None:
    """ValueError where `_set_gradient_checkpointing(*arguments, **options)` asks for the reentrant
    form, which would take the gradient of what all layers share, `shared`, twice."""
    second = arguments[1] if len(arguments) > 1 else None
    function = options.get("gradient_checkpointing_func", second)
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "gradient checkpointing: expected use_reentrant=False, as all layers share "
            f"{shared}, whose gradient the reentrant form would ask for twice, got True. Leave "
            "use_reentrant out"
        )
