"""Which linear maps of a model a delta can be put on, and what they are called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..layers.low_rank import LowRankLinear
from .errors import IncompatibleBaseError, ValidationError

# Of fewer layers than this three are chosen, of others five.
_DEEP = 10
# Around which part of the depth.
_SHARES = {"third": 3, "middle": 2}


def base_model(model: Any) -> Any:
    """The model itself, without what peft or torch.compile put around it."""
    while True:
        # Where peft was never imported, nobody can have wrapped anything with it.
        peft = sys.modules.get("peft")
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
            model = model.base_model
            # A tuner (LoRA, ...) holds the model; prompt tuning has none.
            if isinstance(model, peft.tuners.tuners_utils.BaseTuner):
                model = model.model
        else:
            return model


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """`(in, out)` of a linear map, also of one whose weight is transposed (GPT-2's Conv1D),
    quantised, in two factors (`LowRankLinear`) or wrapped by peft.

    Raises:
        ValidationError: it is none.
    """
    sizes = _sizes(module)
    if sizes is None:
        raise ValidationError(
            f"a delta: expected a linear map, got {type(module).__name__}. Choose a Linear, Conv1D "
            "or quantised linear module"
        )
    return sizes


def is_linear(module: nn.Module) -> bool:
    """Whether a delta can be put on `module`."""
    return _sizes(module) is not None


def _sizes(module: Any) -> tuple[int, int] | None:
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return _sizes(base)
    if type(module).__name__ == "Conv1D" and isinstance(module.nf, int):
        return int(module.weight.shape[0]), module.nf
    sizes: list[Any] = [getattr(module, name, None) for name in ("in_features", "out_features")]
    # Others with these names (Bilinear, a whole block) are not y = W x of one matrix.
    has_map = isinstance(module, nn.Linear | LowRankLinear) or not list(module.children())
    if has_map and all(type(size) is int and size > 0 for size in sizes):
        return sizes[0], sizes[1]
    return None


def decoder_layers(model: nn.Module) -> list[str]:
    """Names of the decoder's blocks, in order: the longest list of modules that is in no other.

    Raises:
        IncompatibleBaseError: there is none.
    """
    whole = base_model(model)
    root = whole.get_decoder() if hasattr(whole, "get_decoder") else whole
    for start in (root, whole):
        lists = [name for name, part in whole.named_modules() if _is_stack(part, start)]
        outer = [name for name in lists if not any(name.startswith(f"{o}.") for o in lists)]
        if outer:
            longest = max(outer, key=lambda name: len(whole.get_submodule(name)))
            return [f"{longest}.{i}" for i in range(len(whole.get_submodule(longest)))]
    raise IncompatibleBaseError(
        f"target_modules: expected a decoder with a list of layers, got {type(whole).__name__} "
        "without one. Name the modules of the delta yourself"
    )


def _is_stack(part: nn.Module, root: nn.Module) -> bool:
    """Whether `part` is a list of blocks with linear maps, somewhere in `root`."""
    return (
        isinstance(part, nn.ModuleList)
        and len(part) > 0
        and any(part is own for own in root.modules())
        and all(any(is_linear(m) for m in block.modules()) for block in part)
        and not any(is_linear(block) for block in part)
    )


def chosen_layers(count: int, layers: str | Sequence[int]) -> list[int]:
    """Positions of the layers: `"third"` and `"middle"` (three around a third or a half of the
    depth, five where there are at least ten layers), `"all"`, or the numbers themselves, sorted.

    Raises:
        ValidationError: another word, or numbers that no layer has.
    """
    if layers == "all":
        return list(range(count))
    if isinstance(layers, str) and layers in _SHARES:
        centre, reach = count // _SHARES[layers], 2 if count >= _DEEP else 1
        return list(range(max(0, centre - reach), min(count, centre + reach + 1)))
    numbers = [] if isinstance(layers, str) else sorted(set(layers))
    if not numbers or any(type(i) is not int or not 0 <= i < count for i in numbers):
        raise ValidationError(
            f"layers: expected 'third', 'middle', 'all' or numbers from 0 to {count - 1}, got "
            f"{layers!r}"
        )
    return numbers


def target_modules(
    model: nn.Module,
    layers: str | Sequence[int] = "third",
    targets: Sequence[str] = ("down_proj",),
) -> list[str]:
    """Names (in the base model) of the linear maps that a delta is put on, in the model's order.

    Args:
        model: a decoder, gravity-patched, quantised or wrapped by peft or not.
        layers: see `chosen_layers`.
        targets: last parts of the names wanted. Where a model has none of them, the map back to
            the residual stream of each feed-forward is taken, found by its shape: from the most
            features to `hidden_size`. Experts of a mixture are left out: they see other rows.

    Raises:
        ValidationError: no such layers, or nothing to put a delta on; the message names what the
            layers have.
        IncompatibleBaseError: no list of decoder layers was found.
    """
    if isinstance(targets, str):
        raise ValidationError(
            f"targets: expected a sequence of names, got {targets!r}. Write ({targets!r},)"
        )
    model = base_model(model)
    blocks = decoder_layers(model)
    chosen = [blocks[i] for i in chosen_layers(len(blocks), layers)]
    linear = {block: _linear_maps(model, block) for block in chosen}
    found = [n for names in linear.values() for n in names if n.rpartition(".")[2] in targets]
    if not found:
        width = getattr(_text_config(model), "hidden_size", None)
        found = [n for names in linear.values() if (n := _way_back(model, names, width))]
    if not found:
        names = sorted({n.rpartition(".")[2] for own in linear.values() for n in own})
        raise ValidationError(
            f"targets: expected a linear map called {' or '.join(targets)} in the layers of "
            f"{type(model).__name__}, found {', '.join(names) or 'none at all'}. Choose of those"
        )
    return found


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _linear_maps(model: nn.Module, block: str) -> list[str]:
    """Names of the linear maps of a block, without peft's factors and without experts."""
    found = []
    for name, module in model.get_submodule(block).named_modules():
        parts = name.split(".")
        inside = any(part == "base_layer" or part.startswith("lora_") for part in parts)
        if name and not inside and "experts" not in parts and is_linear(module):
            found.append(f"{block}.{name}")
    return found


def _way_back(model: nn.Module, names: Sequence[str], width: int | None) -> str | None:
    """The map from the most features to `width`, more of them than `width`."""
    sizes = {name: in_out_features(model.get_submodule(name)) for name in names}
    fitting = [name for name in names if sizes[name][1] == width and sizes[name][0] > width]
    return max(fitting, key=lambda name: sizes[name][0], default=None)
