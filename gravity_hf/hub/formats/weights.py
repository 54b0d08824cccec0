"""The same model in fewer bits: safetensors of half precision or of 8-bit integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..card_tensors import gravity_tensors
from ..own_models import is_own_config
from .programs import plain_errors
from .running import Runner, runner_of_model
from .source import Source, load_runnable

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# In models of our own: linear maps to masses and to coordinates, whose rounding would move tokens,
# and heads, which keep their dtype as a host's do. Patterns, matched from the beginning of a name.
_KEPT = [
    *(r".*\.gravity", r".*(coord|anchor)_proj(_next|_hidden)?", r"(.*\.)?content"),
    *("lm_head", "score", "classifier"),
]


def write_weights(
    source: Source, folder: Path, format: str
) -> tuple[Runner, dict[str, int] | None]:
    """Write a folder that loads with the library and, through `modeling_gravity.py`, without it.

    Masses, softenings and key radii stay float32 and as they were; RuntimeError if not. For `int8`
    torchao rounds the weights of linear layers to 8 bits, a scale for each output; embeddings,
    norms and the output head keep the dtype of the source. ValueError where it finds none.

    Returns:
        The folder, ready to run; for `int8` how many `layers` have 8-bit weights, `of` how many
        linear ones.
    """
    model = load_runnable(source.folder, **_options(format, is_own_config(source.model.config)))
    quantised = _require_quantised(model) if format == "int8" else None
    model.save_pretrained(folder)
    _require_equal_masses(source.folder, folder)
    with plain_errors(source, f"transformers cannot load the {format} weights of"):
        loaded = load_runnable(folder)
    return runner_of_model(loaded, source.kind), quantised


def _require_quantised(model: PreTrainedModel) -> dict[str, int]:
    from torchao.utils import TorchAOBaseTensor

    linear = [x for x in model.modules() if isinstance(x, (nn.Linear, Conv1D))]
    layers = sum(isinstance(x.weight, TorchAOBaseTensor) for x in linear)
    if not layers:
        conv = any(isinstance(x, Conv1D) for x in linear)
        why = "its projections are Conv1D" if conv else "it has no nn.Linear but its output head"
        raise ValueError(
            f"export: expected linear layers for int8, got {type(model).__name__}, of which "
            f"torchao's int8 takes nothing: {why}. Use fp16 or bf16"
        )
    return {"layers": layers, "of": len(linear)}


def _options(format: str, own: bool) -> dict[str, Any]:
    if format in _HALF:
        return {"dtype": _HALF[format]}
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kept = {"modules_to_not_convert": _KEPT} if own else {}
    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(version=2), **kept)}


def _require_equal_masses(source: Path, target: Path) -> None:
    before, after = gravity_tensors(source), gravity_tensors(target)
    changed = [n for n, x in before.items() if n not in after or not torch.equal(x, after[n])]
    if changed or before.keys() != after.keys():
        raise RuntimeError(
            f"export: expected the {len(before)} gravity tensors of {str(source)!r} unchanged, got "
            f"others: {', '.join(changed or sorted(after.keys() - before.keys()))}"
        )
