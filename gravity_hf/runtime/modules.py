"""Modules of the runtime: what one is called, where it is listed, and how its state is kept."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from .checkpoint import read_checkpoint, restore_weights, write_checkpoint
from .ledger import Ledger, entries_of
from .mirror import MirrorLayer

# Packages list their modules there: `name = "package.module:Class"`.
ENTRY_POINTS = "gravity_hf.victoros"
_OWN = "lgt_module"
_Class = TypeVar("_Class", bound=type)
# Weakly: a class that is gone no longer takes its name.
_registry: weakref.WeakValueDictionary[tuple[str, str], type] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class VictorOSModuleMetadata:
    """What a module says about itself; `requirements` as in a requirements file."""

    name: str
    version: str
    requirements: list[str] = field(default_factory=list)
    containment_native: bool = False
    description: str = ""


def victoros_module(
    name: str,
    version: str,
    requirements: list[str] | None = None,
    containment_native: bool = False,
    description: str = "",
) -> Callable[[_Class], _Class]:
    """Class decorator: register the class, and give its instances a ledger and a mirror.

    `_victoros_meta` is set on the class. After its own `__init__`, which keeps its name and
    signature, an instance has `ledger` (of the class's name) and `mirror_layer`, unless it made
    them itself.

    Raises:
        ValueError: no name or version, or another class has both of them already.
        TypeError: the class has `__slots__` that leave no room for the two.
    """
    if not name or not version:
        raise ValueError(
            f"victoros_module: expected a name and a version, got {name!r} and {version!r}"
        )
    meta = VictorOSModuleMetadata(
        name, version, list(requirements or []), containment_native, description
    )

    def decorate(cls: _Class) -> _Class:
        if not cls.__dictoffset__ and not all(hasattr(cls, x) for x in ("ledger", "mirror_layer")):
            raise TypeError(
                f"victoros_module: expected a class whose instances can have ledger and "
                f"mirror_layer, got {cls.__qualname__} with other __slots__. Add the two to them"
            )
        _register(meta, cls)
        cls._victoros_meta = meta
        initialise = cls.__init__

        @functools.wraps(initialise)
        def with_runtime(self: Any, *args: Any, **kwargs: Any) -> None:
            initialise(self, *args, **kwargs)
            # The outermost class of several that are decorated: it is the one that was made.
            if type(self).__init__ is with_runtime or not _initialises(type(self)):
                _provide(self)

        with_runtime._victoros = True  # type: ignore[attr-defined]
        cls.__init__ = with_runtime
        return cls

    return decorate


def registered_modules(*, installed: bool = False) -> dict[str, type]:
    """The registered classes by `name==version`, sorted; what each says is in `_victoros_meta`.

    Args:
        installed: first import what installed packages list under the entry point group
            `gravity_hf.victoros`. That runs their code.
    """
    importlib.import_module(f".{_OWN}", __package__)
    if installed:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            entry.load()
    return {f"{name}=={version}": cls for (name, version), cls in sorted(_registry.items())}


class VictorOSBaseModule:
    """Base of runtime modules: a clock and checkpoints; `process` is what a subclass adds.

    `model`, where a subclass sets it to an `nn.Module`, is part of its checkpoints.
    """

    ledger: Ledger
    mirror_layer: MirrorLayer
    _victoros_meta: VictorOSModuleMetadata

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def process(self, x: Any, **kwargs: Any) -> Any:
        """What the module does with an input."""
        raise NotImplementedError(
            f"{type(self).__name__}.process: expected a subclass that defines it"
        )

    def save_checkpoint(
        self, path: str | os.PathLike[str], extra: dict[str, Any] | None = None
    ) -> None:
        """Write the folder `path`: `model.safetensors` and `victoros.json` with the ledger's
        snapshot and `extra`. An older checkpoint there is replaced as a whole.

        Raises:
            TypeError: `extra` has no JSON form.
            FileExistsError: `path` is something else than a checkpoint, or one with other files in
                it. Nothing is changed.
        """
        content = {
            "module": getattr(type(self), "_victoros_meta", None),
            "ledger_snapshot": self.ledger.snapshot(),
            "extra": extra or {},
        }
        write_checkpoint(path, content, self._model())

    def load_checkpoint(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Restore the model, and the ledger's entries as history.

        Args:
            path: a folder of `save_checkpoint`, or a published `.pt` file, which is read without
                running code from it.

        Returns:
            `ledger_snapshot`, `extra` and, where there is one, `model_state_dict`.

        Raises:
            ValueError: it is no checkpoint, or one of another model; nothing is changed.
        """
        content = read_checkpoint(path)
        entries_of(content["ledger_snapshot"])
        model, weights = self._model(), content.get("model_state_dict")
        if model is not None and weights is not None:
            restore_weights(model, weights, path)
        self.ledger.restore(content["ledger_snapshot"])
        return content

    def _model(self) -> nn.Module | None:
        model = getattr(self, "model", None)
        return model if isinstance(model, nn.Module) else None


def _register(meta: VictorOSModuleMetadata, cls: type) -> None:
    key = (meta.name, meta.version)
    other = _registry.get(key)
    if other is not None and not _same(other, cls):
        # Classes hold themselves: one that nobody has any more may still be waiting.
        del other
        gc.collect()
        other = _registry.get(key)
    if other is not None and not _same(other, cls):
        raise ValueError(
            f"victoros_module: {meta.name} {meta.version} is {other.__module__}."
            f"{other.__qualname__} already, got {cls.__module__}.{cls.__qualname__}. Give it "
            "another name or version"
        )
    _registry[key] = cls


def _same(first: type, second: type) -> bool:
    """One class, or what a reload made of it."""
    return (first.__module__, first.__qualname__) == (second.__module__, second.__qualname__)


def _initialises(cls: type) -> bool:
    return getattr(cls.__init__, "_victoros", False)


def _provide(instance: Any) -> None:
    if not hasattr(instance, "ledger"):
        instance.ledger = Ledger(agent_id=type(instance)._victoros_meta.name)
    if not hasattr(instance, "mirror_layer"):
        instance.mirror_layer = MirrorLayer(ledger=instance.ledger)
