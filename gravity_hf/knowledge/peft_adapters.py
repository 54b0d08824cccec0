"""A delta as a LoRA adapter of peft: on a live model for a while, and in peft's files.

Nothing is ever merged: merging and unmerging changes weights of the base.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import nn

from ..layers.low_rank import LowRankLinear
from ..runtime.encoding import strict_json
from .adapter_files import CONTENT, PREFIX, WEIGHTS_FILE, read_adapter
from .delta import LowRankDelta
from .errors import KnowledgeError, ValidationError
from .store_files import write_bytes
from .targets import base_model

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["adapted", "export_adapter", "read_adapter"]

_NAME = "gravity_beliefs"
_States = dict[Any, tuple[list[str], bool]]


@contextmanager
def adapted(model: nn.Module, delta: LowRankDelta) -> Iterator[None]:
    """While `model` has `delta` in peft's layers; adapters that are on it stay active too.

    Afterwards its modules are the very objects that they were, so that outputs have their bits.

    Raises:
        KnowledgeError: peft is missing.
        IncompatibleBaseError: the delta is for another base.
    """
    _require_peft()
    from peft import inject_adapter_in_model

    delta.check(model)
    base = base_model(model)
    name = _free_name(base)
    with _restored(base, delta, name) as others:
        with warnings.catch_warnings():
            # It warns that there are adapters already, and of transposed weights.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(_lora_config(base, delta), base, adapter_name=name)
        _set_states(others)
        _fill(base, delta, name, others)
        yield


def export_adapter(
    model: nn.Module,
    delta: LowRankDelta,
    directory: str | os.PathLike[str],
    content: Mapping[str, Any],
) -> None:
    """Write peft's two files, as a whole folder or not at all. `content` travels as metadata.

    Raises:
        ValidationError: a residual delta, which is no LoRA; a folder that holds something.
        KnowledgeError: peft is missing.
    """
    _require_peft()
    if delta.kind != "low_rank":
        raise ValidationError(
            f"export_peft: expected a delta of linear maps, got one of kind {delta.kind!r}: it "
            "acts on the output of whole blocks, which no LoRA does. Share the store's file"
        )
    path = Path(directory).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValidationError(
            f"export_peft: expected a new or empty folder, got {str(path)!r} with something in it"
        )
    base = base_model(model)
    config = _lora_config(base, delta)
    config.base_model_name_or_path = getattr(base.config, "_name_or_path", None) or None
    config.inference_mode = True
    tensors = {}
    for name, tensor in delta.to_tensors().items():
        tensors[f"{PREFIX}{name}.weight"] = tensor.cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        config.save_pretrained(str(unfinished))
        metadata = {"format": "pt", CONTENT: strict_json(dict(content))}
        write_bytes(unfinished / WEIGHTS_FILE, save(tensors, metadata))
        unfinished.chmod(0o755)  # mkdtemp's are for their owner alone
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _lora_config(base: nn.Module, delta: LowRankDelta) -> LoraConfig:
    """peft's settings for exactly these maps, at scale 1."""
    from peft import LoraConfig
    from peft.tuners import lora

    ranks = {name: delta.rank(name) for name in delta.factors}
    most = max(ranks.values())
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != most}
    modules = [base.get_submodule(name) for name in delta.factors]
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in modules),
        task_type="CAUSAL_LM",
    )
    if any(isinstance(module, LowRankLinear) for module in modules):
        config._register_custom_module({LowRankLinear: lora.Linear})
    return config


@torch.no_grad()
def _fill(base: nn.Module, delta: LowRankDelta, name: str, others: _States) -> None:
    for module_name, (A, B) in delta.factors.items():
        layer: Any = base.get_submodule(module_name)
        for parts, factor in ((layer.lora_A, A), (layer.lora_B, B)):
            weight = parts[name].weight
            # Nothing is rounded to the base's dtype: peft computes in that of the factors.
            kind = torch.promote_types(factor.dtype, torch.float32)
            weight.data = factor.detach().to(weight.device, kind, copy=True)
        active, is_off = others.get(layer, ([], False))
        layer._active_adapter = [*([] if is_off else active), name]
        layer._disable_adapters = False


@contextmanager
def _restored(base: nn.Module, delta: LowRankDelta, name: str) -> Iterator[_States]:
    """Take out whatever peft put in meanwhile, also where it failed half-way; what adapters of
    others are set to."""
    modules: dict[str, Any] = {n: base.get_submodule(n) for n in delta.factors}
    others = _states(base)
    trainable = [(p, p.requires_grad) for p in base.parameters()]
    configs = vars(base).get("peft_config")
    try:
        yield others
    finally:
        _set_states(others)
        for module_name, module in modules.items():
            if module in others:
                module.delete_adapter(name)
            parent, _, child = module_name.rpartition(".")
            setattr(base.get_submodule(parent), child, module)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        if configs is None:
            vars(base).pop("peft_config", None)
        else:
            configs.pop(name, None)


def _states(base: nn.Module) -> _States:
    """Of every module that peft made: which adapters are active, and whether all are off. To put
    in another adapter, peft switches off those that are there, saved modules included.

    Raises:
        KnowledgeError: adapters are merged into the base, from where peft would take them out.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: _States = {}
    for module in base.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise KnowledgeError(
                f"active: expected the base's own weights, got layers with "
                f"{module.merged_adapters} merged into them. Call unmerge_adapter, or load the "
                "base anew"
            )
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found[module] = list(module.active_adapters), bool(module._disable_adapters)
    return found


def _set_states(states: _States) -> None:
    for module, (active, is_off) in states.items():
        module._active_adapter, module._disable_adapters = list(active), is_off


def _free_name(base: nn.Module) -> str:
    """Of an adapter: `active` may stand inside another."""
    taken = {part for name, _ in base.named_modules() for part in name.split(".")}
    numbers = range(len(taken) + 1)
    return next(name for i in numbers if (name := f"{_NAME}_{i}") not in taken)


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise KnowledgeError(
            "peft is missing: pip install 'gravity_hf[train]', or use compile_bank() and "
            "bank.routed, which need nothing else"
        )
