"""A model run over batches while observers look on, one for each of its gravity modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers.modes import in_evaluation
from ..layers.parameters import GravityParameters
from .observers import Observer
from .placement import execution_device
from .sites import find_attention_sites


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
        device = execution_device(self.model)
        with _observing(self.model, self.modules, observers), torch.no_grad():
            for batch in self.batches:
                inputs = {
                    name: value.to(device) if isinstance(value, Tensor) else value
                    for name, value in batch.items()
                }
                for name, observer in observers.items():
                    observer.real_tokens = _real_tokens(self.model, inputs, name)
                self.model(**inputs)
                self.bar.update()
        unseen = [name for name, observer in observers.items() if not observer.calls]
        if unseen:
            raise ValueError(self._unreached(unseen))

    def _unreached(self, unseen: list[str]) -> str:
        """A model of several towers may be meant to run without some of them: say how to."""
        parts = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in unseen})
        sites = [site.name for site in find_attention_sites(self.model)]
        reached = [i for i, name in enumerate(sites) if name in self.modules and name not in unseen]
        return (
            f"{self.caller}: expected batches that reach every converted attention module, "
            f"{len(unseen)} of {len(self.modules)} saw none: {', '.join(parts)}. Pass inputs that "
            "exercise them too, or leave them on dot product: unpatch_gravity(model), then "
            f"patch_with_gravity(model, GravityConfig(layers={_as_ranges(reached)}))"
        )


def _real_tokens(model: nn.Module, inputs: Mapping[str, Any], name: str) -> Tensor | None:
    """`[B, T]` bool: tokens that are no padding, on the module's side of the model; None: all."""
    mask = inputs.get("attention_mask")
    if getattr(model.config, "is_encoder_decoder", False) and "decoder" in name:
        mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
        if mask is None and "decoder_input_ids" not in inputs and isinstance(labels, Tensor):
            mask = labels != -100
    is_plain = isinstance(mask, Tensor) and mask.dim() == 2
    return mask.bool() if is_plain else None  # type: ignore[union-attr]


def _as_ranges(indices: list[int]) -> str:
    """Python for a tuple of increasing indices: `(*range(0, 24), *range(30, 32))`."""
    starts = [i for i in indices if i - 1 not in indices]
    stops = [i + 1 for i in indices if i + 1 not in indices]
    parts = [f"*range({a}, {b})" for a, b in zip(starts, stops, strict=True)]
    return f"({', '.join(parts)},)" if parts else "()"


@contextmanager
def _observing(
    model: nn.Module,
    modules: Mapping[str, GravityParameters],
    observers: Mapping[str, Observer],
) -> Iterator[None]:
    for name, gravity in modules.items():
        gravity.observer = observers[name]
    try:
        with in_evaluation(model):
            yield
    finally:
        for gravity in modules.values():
            gravity.observer = None
