"""Finding the attention modules of a model that route through AttentionInterface."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedModel

Function = TypeVar("Function", bound=Callable[..., Any])

_HEAD_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEAD_COUNT_NAMES = ("num_key_value_heads", "num_kv_heads")


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
    if issubclass(cls, PreTrainedModel):
        return False
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _method_codes(cls))


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
    config = getattr(module, "config", None)
    query_heads = _first_int(module, _HEAD_COUNT_NAMES) or _first_int(config, _HEAD_COUNT_NAMES)
    if query_heads is None:
        raise ValueError(
            f"{name} ({type(module).__name__}): expected its number of heads under one of "
            f"{list(_HEAD_COUNT_NAMES)} on the module or its config, found none"
        )
    groups = getattr(module, "num_key_value_groups", None)
    if isinstance(groups, int) and groups > 0:
        return query_heads, query_heads // groups
    return query_heads, _first_int(module, _KV_HEAD_COUNT_NAMES) or query_heads


def _first_int(owner: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _looks_like_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and any(True for _ in module.parameters())


def _inside_routed(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    return any(routes_through_interface(type(parent)) for parent in parents)
