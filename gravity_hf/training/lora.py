"""LoRA on a gravity model, masses and softenings included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..integration.adapters import GravityLoraConfig
from ..integration.hosts import settings_of
from ..integration.own_models import is_own_model, own_attention_names, refuse_own
from ..integration.sites import find_attention_sites

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def gravity_lora(
    model: PreTrainedModel,
    r: int = 8,
    *,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> PeftModel:
    """A peft model with LoRA on the attention projections; masses and softenings train in full.

    Args:
        model: patched, usually calibrated; or a model that is gravity by construction (LGT, NGT),
            whose constants and mass projections train in full, and whose positions stay.
        r: rank of the LoRA matrices.
        alpha: LoRA scale numerator: updates are scaled by `alpha / r`.
        dropout: dropout on the LoRA input.
        target_modules: as in peft; None takes every projection (q, k, v, o, by whatever names) of
            the attention blocks; of an LGT, which has few there, all linear maps of its layers.

    Returns:
        A `PeftModel`. Saving it writes the adapter, the gravity tensors and the gravity settings;
        `load_gravity_adapter` or `load_gravity_model` bring it back, and peft alone refuses it
        (on an LGT, which cannot be anything but gravity, peft alone may load it).
        Train it with `GravityTrainer`, or with the parameter groups of `gravity_param_groups`:
        masses need a larger learning rate.

    Raises:
        RuntimeError: the model is not patched. TypeError: a model of our own without gravity.
    """
    if is_own_model(model):
        if not own_attention_names(model):
            raise TypeError(
                f"gravity_lora: expected a model with gravity in it, got {type(model).__name__}, "
                "whose attention takes dot products. Take peft.get_peft_model"
            )
        chosen = own_projections(model) if target_modules is None else target_modules
        own = _lora_settings(model, r, alpha, dropout, chosen)
        return _under_lora(model, LoraConfig(**own, modules_to_save=["gravity"]))
    settings = settings_of(model)
    if settings is None:
        raise RuntimeError(
            f"gravity_lora: expected a patched model, got {type(model).__name__}. The order is: "
            "load, patch_with_gravity, calibrate, gravity_lora"
        )
    config = GravityLoraConfig(
        **_lora_settings(model, r, alpha, dropout, target_modules),
        modules_to_save=["gravity"],
        gravity=settings.to_dict(),
    )
    return _under_lora(model, config)


def host_lora(
    model: PreTrainedModel,
    r: int = 8,
    *,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> PeftModel:
    """The same LoRA on a host that keeps its dot-product attention: the control of a heal.

    What a heal gains must be compared with what the host gains from the same steps on the same
    data, or the text takes credit for the attention. Arguments: as for `gravity_lora`.

    Raises:
        RuntimeError: the model is patched.
    """
    refuse_own(model, "host_lora", "It has no host to be a control. Call gravity_lora")
    if settings_of(model) is not None:
        raise RuntimeError(
            f"host_lora: expected an unpatched host, got {type(model).__name__}. For a patched "
            "model call gravity_lora"
        )
    return _under_lora(
        model, LoraConfig(**_lora_settings(model, r, alpha, dropout, target_modules))
    )


def _lora_settings(
    model: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str] | str | None,
) -> dict[str, Any]:
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": (
            attention_projections(model) if target_modules is None else target_modules
        ),
        "task_type": _task_type(model),
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
    }


def _under_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    peft_model = get_peft_model(model, config)
    if _is_checkpointing(model):
        # Frozen embeddings give checkpointed blocks no input that needs a gradient.
        model.enable_input_require_grads()
    return peft_model


def _is_checkpointing(model: PreTrainedModel) -> bool:
    # Two names for one thing, by version of transformers; the older one warns in the newer.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    known = next(name for name in names if hasattr(type(model), name))
    return bool(getattr(model, known))


def attention_projections(model: nn.Module) -> list[str]:
    """Full names of the linear layers in and around the routed attention modules.

    Hosts of the BERT family keep the output projection in a sibling of the attention module, so the
    search covers the enclosing block when that block is nothing but attention.
    """
    names: set[str] = set()
    for site in find_attention_sites(model):
        names |= _linear_names(site.name, site.module)
        parent_name, _, _ = site.name.rpartition(".")
        parent = model.get_submodule(parent_name) if parent_name else None
        if parent is not None and "Attention" in type(parent).__name__:
            names |= _linear_names(parent_name, parent)
    return sorted(names)


def own_projections(model: nn.Module) -> list[str]:
    """Full names of the linear maps in the layers of a model that is gravity by construction,
    without those that make masses."""
    names: set[str] = set()
    for attention in own_attention_names(model):
        layer = attention.rpartition(".")[0]
        names |= _linear_names(layer, model.get_submodule(layer))
    return sorted(name for name in names if ".gravity." not in name)


def _linear_names(prefix: str, module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if name else prefix
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, Conv1D))
    }


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in _TASK_TYPES.items() if name.endswith(ending)), None)
