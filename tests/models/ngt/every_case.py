"""Every tiny model whose promises do not depend on how it attends: NGTs and their twins."""

from __future__ import annotations

from typing import Any

from gravity_hf.models.ngt import NGTForCausalLM, NGTPreTrainedModel

from .ngt_cases import OPTIONS, option, tiny

TWINS = {f"twin, {how}": how for how in ("learned", "sinusoidal", "alibi", "none")}
EVERY = [*OPTIONS, *TWINS]


def any_model(name: str, model_class: type = NGTForCausalLM, **settings: Any) -> NGTPreTrainedModel:
    """The tiny model of an entry of `EVERY`, in evaluation."""
    if name in OPTIONS:
        return option(name, model_class, **settings)
    twin = {"attention": "dot_product", "positions": TWINS[name]}
    return tiny(model_class, **{**twin, **settings})
