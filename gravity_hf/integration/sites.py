"""Finding the attention modules of a model that route through AttentionInterface."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedModel

from .support import NO_HEADS

Function = TypeVar("Function", bound=Callable[..., Any])

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_HEAD_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEAD_COUNT_NAMES = ("num_key_value_heads", "num_kv_heads")
# On the module only: what else a module calls them. On a config such words mean other things.
_RARE_HEAD_COUNT_NAMES = ("heads", "groups")
_KEY_PROJECTION_NAMES = ("k_proj", "k_content_proj")


class AttentionSite(NamedTuple):
    """One attention module: its dotted name in the model, itself, and its head counts."""

    name: str
    module: nn.Module
    query_heads: int
    key_value_heads: int


def memoised(function: Function) -> Function:
    """`functools.cache` that keeps the function's signature for type checkers."""
    return functools.cache(function)  # type: ignore[return-value]


def find_attention_sites(model: nn.Module) -> list[AttentionSite]:
    """The routed attention modules of `model`, in module order.

    Raises:
        TypeError: the model has none (its attention does not go through AttentionInterface).
        ValueError: the head counts of one cannot be read.
    """
    sites = [
        AttentionSite(name, module, *head_counts(name, module))
        for name, module in model.named_modules()
        if routes_through_interface(type(module))
    ]
    if not sites:
        own = sorted({type(m).__name__ for m in model.modules() if _looks_like_attention(m)})
        raise TypeError(
            f"{type(model).__name__} cannot be patched: expected attention modules that go through "
            f"transformers' AttentionInterface, found {own or 'no attention at all'}, which "
            "compute attention on their own. Use a host with custom attention implementations"
        )
    return sites


def find_own_attention(model: nn.Module) -> tuple[str, ...]:
    """Names of attention modules that compute attention on their own, out of our reach."""
    return tuple(
        name
        for name, module in model.named_modules()
        if _looks_like_attention(module)
        and not any(routes_through_interface(type(m)) for m in module.modules())
        and not any(_looks_like_attention(m) for m in module.children())
        # A wrapped projection stack such as BertSelfOutput sits beside the routed module.
        and "Output" not in type(module).__name__
        and not _inside_routed(model, name)
    )


@memoised
def routes_through_interface(cls: type) -> bool:
    """Whether a method of `cls` looks up its attention function in transformers' registry.

    Reads compiled code, not source text: the lookup is a global name in the method's bytecode.
    """
    if issubclass(cls, PreTrainedModel) or cls.__name__ in NO_HEADS:
        return False
    return any(_looks_up(code) for code in _method_codes(cls))


def _looks_up(code: CodeType) -> bool:
    """Whether `code` uses the registry as one. `getattr(registry, name, eager)` asks an object for
    an attribute that it never has: such a module runs its own attention whatever is registered."""
    if _REGISTRY not in code.co_names:
        return False
    if "getattr" not in code.co_names:
        return True
    names = [step.argval for step in dis.get_instructions(code)]
    before = {names[i - 1] for i, name in enumerate(names) if i and name == _REGISTRY}
    return before != {"getattr"}


def _method_codes(cls: type) -> Iterator[CodeType]:
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else None
            code = getattr(function, "__code__", None)
            if code is not None:
                yield code
                yield from (c for c in code.co_consts if isinstance(c, CodeType))


def head_counts(name: str, module: nn.Module) -> tuple[int, int]:
    """`(query heads, key-value heads)` of an attention module."""
    groups = _first_int(module, ("num_key_value_groups",)) or 0
    query_heads = (
        _first_int(module, _HEAD_COUNT_NAMES)
        or _first_int(module, _RARE_HEAD_COUNT_NAMES)
        # What the config counts may be the heads of another part: an encoder's in a decoder.
        or _heads_by_width(module) * max(groups, 1)
        or _first_int(
            getattr(module, "config", None), _HEAD_COUNT_NAMES, getattr(module, "layer_idx", None)
        )
    )
    if not query_heads:
        raise ValueError(
            f"{name} ({type(module).__name__}): expected its number of heads under one of "
            f"{list(_HEAD_COUNT_NAMES)} on the module or its config, found none. Leave such a "
            "module out with GravityConfig(layers=[...])"
        )
    if groups > 0:
        return query_heads, query_heads // groups
    return query_heads, _first_int(module, _KV_HEAD_COUNT_NAMES) or query_heads


def _heads_by_width(module: nn.Module) -> int:
    """Key-value heads by the width of the key projection, which no gate widens; 0 if not known."""
    width = _first_int(module, ("head_dim",))
    projections = (getattr(module, name, None) for name in _KEY_PROJECTION_NAMES)
    widths = (getattr(projection, "out_features", None) for projection in projections)
    out = next((w for w in widths if isinstance(w, int)), 0)
    return out // width if width and out % width == 0 else 0


def _first_int(owner: object, names: tuple[str, ...], layer: int | None = None) -> int | None:
    """The first of these attributes that is a number; of a list for all layers, the layer's."""
    values = (getattr(owner, name, None) for name in names)
    if layer is not None:
        values = (
            v[layer] if isinstance(v, (list, tuple)) and len(v) > layer else v for v in values
        )
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _looks_like_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and any(True for _ in module.parameters())


def _inside_routed(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    return any(routes_through_interface(type(parent)) for parent in parents)
