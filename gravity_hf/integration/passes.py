"""A model run over batches while observers look on, one for each of its gravity modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers.parameters import GravityParameters
from .observers import Observer


class Passes:
    """Runs the same batches as often as asked. A generator is read into memory first.

    Args:
        caller: the function that error messages name.
        model: patched; in evaluation mode and without gradients while it runs, then as before.
        modules: its gravity modules, by the name of their attention module.
        batches: model inputs as dicts of tensors.
        progress: True or False; None shows a bar on terminals only.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        modules: Mapping[str, GravityParameters],
        batches: Iterable[Mapping[str, Any]],
        progress: bool | None,
    ) -> None:
        self.caller, self.model, self.modules = caller, model, modules
        self.batches = list(batches)
        if not self.batches:
            raise ValueError(f"{caller}: expected at least one batch of model inputs, got none")
        hidden = None if progress is None else not progress
        self.bar = tqdm(total=0, desc=caller, unit="batch", disable=hidden)

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def expect(self, passes: int) -> None:
        """The bar's end: `passes` more passes from here at most."""
        self.bar.total = self.bar.n + passes * len(self.batches)
        self.bar.refresh()

    def run(self, observers: Mapping[str, Observer]) -> None:
        """One pass over all batches.

        Raises:
            ValueError: a module that no batch reached.
        """
        device = next(self.model.parameters()).device
        with _observing(self.model, self.modules, observers), torch.no_grad():
            for batch in self.batches:
                inputs = {
                    name: value.to(device) if isinstance(value, Tensor) else value
                    for name, value in batch.items()
                }
                padding = inputs.get("attention_mask")
                is_plain = isinstance(padding, Tensor) and padding.dim() == 2
                real_tokens = padding.bool() if is_plain else None  # type: ignore[union-attr]
                for observer in observers.values():
                    observer.real_tokens = real_tokens
                self.model(**inputs)
                self.bar.update()
        unseen = [name for name, observer in observers.items() if not observer.calls]
        if unseen:
            raise ValueError(
                f"{self.caller}: expected batches that reach every converted attention module, "
                f"{len(unseen)} saw none, such as {unseen[0]}. Pass the inputs that exercise them, "
                "or leave them out with GravityConfig(layers=[...])"
            )


@contextmanager
def _observing(
    model: nn.Module,
    modules: Mapping[str, GravityParameters],
    observers: Mapping[str, Observer],
) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    for name, gravity in modules.items():
        gravity.observer = observers[name]
    try:
        yield
    finally:
        for gravity in modules.values():
            gravity.observer = None
        for module, mode in training.items():
            module.training = mode
