"""Which forward hooks of a model are the library's own: transformers leaves some there, too."""

from __future__ import annotations

from torch import nn


def own_hooks(model: nn.Module) -> int:
    """How many there are."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    # A partial has no module of its own.
    made_by = [getattr(getattr(hook, "func", hook), "__module__", "") for hook in hooks]
    return sum(name.startswith("gravity_hf") for name in made_by)
