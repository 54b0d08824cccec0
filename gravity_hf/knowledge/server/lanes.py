"""Texts that share forward passes, each with its own beliefs and its own place in the cache."""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

Route = Callable[[Sequence[Sequence[str]]], AbstractContextManager[None]]


class Caller:
    """Calls a causal LM with what its forward accepts."""

    def __init__(self, model: Any) -> None:
        self.model = model
        accepted = set(inspect.signature(model.forward).parameters)
        self.takes_padding = {"attention_mask", "position_ids"} <= accepted
        # transformers 5.24 renames it, in arguments and outputs.
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.inference_mode()
    def __call__(
        self,
        ids: Sequence[Sequence[int]],
        cache: Any = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits of the last tokens `[B, V]`, and the cache, which is None where there is none."""
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids, device=device), "use_cache": True}
        if cache is not None:
            inputs[self._cache_name] = cache
        if mask is not None and positions is not None:
            inputs["attention_mask"] = mask.to(device)
            inputs["position_ids"] = positions.to(device)
        output = self.model(**inputs, **self._last_only)
        return output.logits[:, -1], getattr(output, self._cache_name, None)


class Lane:
    """One to `capacity` texts, one forward pass a step.

    A lane of one text calls the model without padding or mask: what it writes depends on nothing
    but its own tokens and beliefs. In a fuller lane rows of different lengths are padded on the
    left, which changes a row's logits by rounding.

    Args:
        caller: of the model.
        route: `DeltaBank.routed`; its contexts live in a `contextvars.Context` of the lane, so
            that lanes of one thread do not see each other's.
        capacity: texts at most.
    """

    def __init__(self, caller: Caller, route: Route, capacity: int) -> None:
        self._caller, self._route, self._capacity = caller, route, capacity
        self.rows: list[Any] = []
        self._beliefs: list[tuple[str, ...]] = []
        self._cache: Any = None
        self._lengths = torch.zeros(0, dtype=torch.long)  # tokens in the cache, of each row
        self._context, self._opened = contextvars.copy_context(), ExitStack()

    def has_room(self) -> bool:
        """Whether one more text can join."""
        if not self.rows:
            return True
        return len(self.rows) < self._capacity and _can_merge(self._cache, self._caller)

    def join(self, row: Any, ids: Sequence[int], beliefs: Sequence[str]) -> Tensor:
        """Read a text's prompt, alone, and keep its cache. Logits `[V]` of what comes next."""
        with ExitStack() as opened:
            context = contextvars.copy_context()
            context.run(opened.enter_context, self._route([tuple(beliefs)]))
            try:
                logits, cache = context.run(self._caller, [list(ids)])
            finally:
                context.run(opened.close)
        self._take(row, len(ids), tuple(beliefs), cache)
        return logits[0]

    def _take(self, row: Any, length: int, beliefs: tuple[str, ...], cache: Any) -> None:
        self._cache = cache if not self.rows else _merged(self._cache, cache)
        self.rows.append(row)
        self._beliefs.append(beliefs)
        self._lengths = torch.cat([self._lengths, torch.tensor([length])])
        self._reroute()

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read each row's newest token; logits `[B, V]` of the next.

        Args:
            tokens: of each row all so far, prompt included; only a model without a cache reads
                more than the last.
        """
        if self._cache is None:
            return self._context.run(self._caller, [list(tokens[0])])[0]
        mask = positions = None
        if len(self.rows) > 1:
            self._lengths += 1
            width = int(self._lengths.max())
            mask = (torch.arange(width) >= width - self._lengths[:, None]).long()
            positions = self._lengths[:, None] - 1
        else:
            self._lengths += 1
        newest = [[row[-1]] for row in tokens]
        logits, self._cache = self._context.run(self._caller, newest, self._cache, mask, positions)
        return logits

    def leave(self, row: Any) -> None:
        """Forget a text and what it holds of the cache."""
        kept = [i for i, other in enumerate(self.rows) if other is not row]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        self._beliefs = [self._beliefs[i] for i in kept]
        self._lengths = self._lengths[kept]
        self._cache = _selected(self._cache, kept, self._lengths) if kept else None
        self._reroute()

    def close(self) -> None:
        """Forget all texts."""
        for row in list(self.rows):
            self.leave(row)

    def _reroute(self) -> None:
        """Open the route of the rows as they are now; it stays open until they change."""
        self._context.run(self._opened.close)
        self._context, self._opened = contextvars.copy_context(), ExitStack()
        if self.rows:
            self._context.run(self._opened.enter_context, self._route(self._beliefs))


def _can_merge(cache: Any, caller: Caller) -> bool:
    """Whether rows can be put beside those of a cache: plain keys and values of every token."""
    layers = getattr(cache, "layers", None)
    return bool(
        caller.takes_padding
        and isinstance(cache, DynamicCache)
        and layers
        and all(type(layer) is DynamicLayer for layer in layers)
    )


@torch.inference_mode()
def _merged(cache: Any, other: Any) -> Any:
    """`cache` with the rows of `other` below; the shorter is padded on the left."""
    width = max(cache.get_seq_length(), other.get_seq_length())
    for layer, new in zip(cache.layers, other.layers, strict=True):
        layer.keys = torch.cat([_padded(layer.keys, width), _padded(new.keys, width)])
        layer.values = torch.cat([_padded(layer.values, width), _padded(new.values, width)])
    return cache


def _padded(states: Tensor, width: int) -> Tensor:
    """`[B, H, T, D]` with zeros before the first token, up to `width` tokens."""
    return functional.pad(states, (0, 0, width - states.shape[-2], 0))


@torch.inference_mode()
def _selected(cache: Any, kept: Sequence[int], lengths: Tensor) -> Any:
    """Only some rows, without the padding that none of them needs."""
    width = int(lengths.max())
    for layer in cache.layers:
        index = torch.tensor(kept, device=layer.keys.device)
        layer.keys = layer.keys[index, :, -width:]
        layer.values = layer.values[index, :, -width:]
    return cache
