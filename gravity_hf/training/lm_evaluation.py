"""Gravity models in lm-evaluation-harness: importing this module registers `gravity-hf` there.

The harness has no plugin hook for models, so that its own `lm_eval` command cannot find this one;
`gravity-hf lm-eval` imports it first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import nn

from ..integration.hosts import gravity_modules
from ..integration.loading import ADAPTER_CONFIG_NAME, load_gravity_model
from ..integration.own_models import is_own_model, why_no_text

MODEL_NAME = "gravity-hf"

# Each of them would load weights on another way than `load_gravity_model`, which checks them.
_OTHER_LOADERS = {
    "peft": "give the folder of the gravity adapter as pretrained; its base is loaded with it",
    "delta": "save the sum as a gravity model first",
    "autogptq": "its kernels replace the attention",
    "gptqmodel": "its kernels replace the attention",
    "gguf_file": "GGUF files hold no gravity tensors",
    "subfolder": "give the folder itself as pretrained",
}


@register_model(MODEL_NAME)
class GravityLM(HFLM):
    """lm-evaluation-harness's `hf` model, for gravity models and this library's own.

    `--model gravity-hf --model_args pretrained=FOLDER` takes what `load_gravity_model` takes (a
    saved gravity model, one of the library's own (LGT, NGT and its twin, LeanFormer with either
    attention), a gravity adapter's folder, a host with Gravity-2's masses beside it), and the
    other arguments of `hf`: dtype, device, batch_size, max_length, parallelize, tp_plan, ...

    Args:
        pretrained: a folder, a name on the Hub, or a gravity model (with `tokenizer=`).
        **options: as for `lm_eval.models.huggingface.HFLM`.

    Raises:
        ValueError: a plain host, a model that writes no text by itself, or an option that loads
            weights in another way.
    """

    def __init__(self, pretrained: str | nn.Module, **options: Any) -> None:
        for name, reason in _OTHER_LOADERS.items():
            if options.get(name):
                raise ValueError(
                    f"{MODEL_NAME}: expected no {name}, got {options[name]!r}: {reason}"
                )
        if isinstance(pretrained, nn.Module):
            _require_gravity(pretrained)
        super().__init__(pretrained, **options)

    def _get_config(self, pretrained: str, **options: Any) -> None:
        super()._get_config(_base_of(pretrained) or pretrained, **options)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        base = _base_of(pretrained) if isinstance(pretrained, str) else None
        if base and not tokenizer and not Path(pretrained, "tokenizer_config.json").is_file():
            tokenizer = base
        super()._create_tokenizer(pretrained, tokenizer, **options)

    def _create_model(
        self,
        pretrained: str,
        revision: str | None = "main",
        dtype: Any = "auto",
        parallelize: bool | None = False,
        gpus: int | None = None,
        max_memory_per_gpu: int | str | None = None,
        max_cpu_memory: int | str | None = None,
        offload_folder: str | None = "./offload",
        tp_plan: Any = None,
        quantization_config: Any = None,
        **options: Any,
    ) -> None:
        known = {*_OTHER_LOADERS, "trust_remote_code"}
        chosen = {name: value for name, value in options.items() if name not in known}
        if tp_plan is not None:
            chosen["tp_plan"] = tp_plan
        else:
            chosen |= self._get_accelerate_args(
                parallelize=parallelize,
                device_map=options.get("device_map"),
                max_memory_per_gpu=max_memory_per_gpu,
                max_cpu_memory=max_cpu_memory,
                offload_folder=offload_folder,
                gpus=gpus,
            )
        if quantization_config is not None:
            chosen["quantization_config"] = quantization_config
        # Strings such as "float16" and "auto" are what `from_pretrained` takes too.
        model = load_gravity_model(pretrained, revision=revision, dtype=dtype, **chosen)
        _require_own_text(model)
        # Anything else has logits too, of something else than the next token.
        if not model.can_generate():
            raise ValueError(
                f"{MODEL_NAME}: expected a model that writes text, {pretrained} holds a "
                f"{type(model).__name__}. Compare an encoder by its embeddings: "
                "gravity-hf evaluate"
            )
        self._model = model


def _require_gravity(model: nn.Module) -> None:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not gravity_modules(model) and not is_own_model(base):
        raise ValueError(
            f"{MODEL_NAME}: expected a gravity model, got a plain {type(model).__name__}. "
            "Patch it with patch_with_gravity, or evaluate it with --model hf"
        )
    _require_own_text(base)


def _require_own_text(model: Any) -> None:
    """Refuse a model that is gravity by construction and predicts no next token of a text alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reason = why_no_text(base.config) if is_own_model(base) else None
    if reason is not None:
        raise ValueError(
            f"{MODEL_NAME}: expected a causal model that continues text, got {reason}. Measure it "
            "in Python"
        )


def _base_of(folder: str) -> str | None:
    """The base model of an adapter's folder; None for any other folder or name."""
    adapter = Path(folder, ADAPTER_CONFIG_NAME)
    if not adapter.is_file() or Path(folder, "config.json").is_file():
        return None
    from ..integration.adapters import base_of_adapter

    return base_of_adapter(str(adapter))
