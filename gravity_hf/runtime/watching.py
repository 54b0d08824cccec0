"""Keeping what a forward attended with, at the cost of a few references."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.observing import ObservedCall


@dataclass(frozen=True, eq=False)
class SeenCall:
    """One attention call of a forward.

    `name` of the attention module; `curved`: whether its distances are; `real` `[B, T]`: nonzero
    where a token is not padding; None where the model was not told.
    """

    name: str
    curved: bool
    call: ObservedCall
    real: Tensor | None


class Watch:
    """The attention calls of the last forward of one model, in order."""

    def __init__(self) -> None:
        self.calls: list[SeenCall] = []
        self.forwards = 0
        self._inside = False
        self._masks: dict[nn.Module, Tensor | None] = {}

    def begin(self, *_: Any) -> None:
        self.calls.clear()
        self.forwards += 1
        self._inside = True

    def end(self, *_: Any) -> None:
        self._inside = False
        self._masks.clear()

    def note_mask(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            # No `bind`: a wrapper may take arguments that the signature does not show.
            named = zip(inspect.signature(module.forward).parameters, args, strict=False)
            mask = dict(named).get("attention_mask")
        self._masks[module] = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def keep(self, name: str, curved: bool, owner: nn.Module | None, call: ObservedCall) -> None:
        # Not what activation checkpointing computes once more in the backward pass.
        if self._inside:
            self.calls.append(SeenCall(name, curved, call, self._masks.get(owner)))


class _Observer:
    """Of one module, which goes on as it would without."""

    def __init__(self, watch: Watch, name: str, curved: bool, owner: nn.Module | None) -> None:
        self.watch, self.name, self.curved, self.owner = watch, name, curved, owner

    def attend(self, call: ObservedCall) -> tuple[Tensor, Tensor | None]:
        result = call.gravity()
        self.watch.keep(self.name, self.curved, self.owner, call)
        return result


def observed_modules(model: nn.Module) -> dict[str, list[Any]]:
    """The modules that take an observer, by the name of the attention module that they belong to:
    its `gravity` child, and every copy of it that peft keeps."""
    found = {}
    for name, module in model.named_modules():
        child = module._modules.get("gravity")
        copies = [] if child is None else [m for m in child.modules() if "observer" in vars(m)]
        if copies:
            found[name] = copies
    return found


@contextmanager
def watching(model: nn.Module, watch: Watch) -> Iterator[None]:
    """While `watch` keeps the calls of `model`'s forwards.

    Raises:
        TypeError: `model` has no gravity.
        RuntimeError: somebody else watches it.
    """
    modules = observed_modules(model)
    if not modules:
        raise TypeError(
            f"MirrorLayer.watch: expected a model with gravity attention, got "
            f"{type(model).__name__} without. Load a gravity model, or patch_with_gravity(model)"
        )
    taken = [
        name for name, copies in modules.items() if any(m.observer is not None for m in copies)
    ]
    if taken:
        raise RuntimeError(
            f"MirrorLayer.watch: expected a model that nobody watches, got one whose {taken[0]} "
            "has an observer: calibration, transfer or another mirror. Let that end first"
        )
    ancestors = dict(model.named_modules())
    owners: dict[nn.Module, None] = {}
    with ExitStack() as undo:
        for name, copies in modules.items():
            owner = _owner(name, ancestors)
            if owner is not None:
                owners[owner] = None
            observer = _Observer(watch, name, _is_curved(name, ancestors), owner)
            for module in copies:
                module.observer = observer
                undo.callback(setattr, module, "observer", None)
        for hook in _hooks(model, owners, watch):
            undo.callback(hook.remove)
        undo.callback(watch.end)
        yield


def _hooks(model: nn.Module, owners: Mapping[nn.Module, None], watch: Watch) -> Iterator[Any]:
    yield model.register_forward_pre_hook(watch.begin)
    yield model.register_forward_hook(watch.end, always_call=True)
    for owner in owners:
        yield owner.register_forward_pre_hook(watch.note_mask, with_kwargs=True)


def _path(name: str) -> list[str]:
    """`name` and the names of all modules around it, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _owner(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The innermost model around an attention module: the one that is told about padding."""
    around = (modules[part] for part in _path(name))
    return next((module for module in around if isinstance(module, PreTrainedModel)), None)


def _is_curved(name: str, modules: Mapping[str, nn.Module]) -> bool:
    configs = (getattr(modules[part], "config", None) for part in _path(name))
    known = (getattr(config, "curvature", None) for config in configs)
    return bool(next((curvature for curvature in known if curvature is not None), 0.0))
