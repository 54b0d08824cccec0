"""A KV cache that does not copy itself for every token, and keeps what chooses keys beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..ops.sparse import block_means
from .sparse_forward import KEPT, KeptScreening
from .sparse_settings import sparse_modules

# How much room a full buffer gets, and in what steps of tokens.
_GROWTH, _STEP = 1.5, 64


class ScreenedCache(DynamicCache):
    """As `DynamicCache`, for any model under `generate(..., past_key_values=cache)`.

    `DynamicCache` concatenates, and so copies every key and value for every new token. Here buffers
    with room to spare grow by half when they are full. Of a model made sparse the means of blocks
    of keys are kept too, and the screening keys where it has projections: each is computed once,
    and the attention function finds them on the key tensor that it is handed. (Of padded rows it
    computes the means anew: their blocks begin at their own first token.)

    >>> cache = ScreenedCache(model)
    >>> model.generate(**inputs, past_key_values=cache)
    >>> cache.memory()

    Layers that keep a sliding window only, or states instead of keys, are those of `DynamicCache`.

    Args:
        model: whose text is cached; its config says which layers there are, and its attention
            modules what is kept. None: see `config`.
        config: without a model, its config: then no screening keys are kept.
    """

    def __init__(
        self, model: PreTrainedModel | None = None, config: PreTrainedConfig | None = None
    ) -> None:
        super().__init__(config=config if model is None else model.config)
        modules = [] if model is None else [*sparse_modules(model).values(), *_own_modules(model)]
        sparse = {m.layer_idx: m for m in modules if hasattr(m, "layer_idx")}
        self.layers: list[Any] = [
            GrowingLayer(sparse.get(number)) if type(layer) is DynamicLayer else layer
            for number, layer in enumerate(list(self.layers))
        ]
        if not self.layers:
            self.layer_class_to_replicate = GrowingLayer

    def memory(self) -> dict[str, int]:
        """Bytes of storages: `keys_values`, `screening` (its keys and means), and `bytes`, their
        sum; room to spare counts."""
        parts = [_bytes_of(layer) for layer in self.layers]
        total = {name: sum(part[name] for part in parts) for name in ("keys_values", "screening")}
        return {**total, "bytes": sum(total.values())}


class GrowingLayer(DynamicLayer):
    """Keys and values `[B, G, tokens, width]` at the front of buffers that have room for more.

    Args:
        module: the sparse attention module that reads them, or None.
    """

    keys: Any
    values: Any

    def __init__(self, module: Any = None, **_: Any) -> None:
        super().__init__()
        self._screening: Any = None
        self._block_size = 0  # no means are kept
        if module is not None:
            self._screening = module._modules.get("screening")
            self._block_size = budget_of(module).block_size
        self._buffers: dict[str, Tensor] = {}
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = {"keys": _room(key_states), "values": _room(value_states)}
        self._length = 0
        self.is_initialized = True
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, G, new, width]`; all keys and values so far, views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = {"keys": key_states, "values": value_states}
        if self._screening is not None:
            new["screen"] = self._screening.screen_keys(key_states)
        stop = self._length + key_states.shape[-2]
        for name, states in new.items():
            self._write(name, states, self._length, stop)
        if self._block_size:
            self._add_means(self._length, stop)
        self._length = stop
        self._show()
        return self.keys, self.values

    def _write(self, name: str, states: Tensor, start: int, stop: int) -> None:
        buffer = _with_room(self._buffers.get(name, _room(states)), start, stop)
        buffer[:, :, start:stop] = states
        self._buffers[name] = buffer

    def _add_means(self, before: int, now: int) -> None:
        """Those of the blocks that the tokens from `before` to `now` complete. The last block has a
        place before it is full, which nobody reads."""
        size = self._block_size
        start, stop = before // size, now // size
        source = self._buffers["screen" if self._screening is not None else "keys"]
        if stop > start:
            means = block_means(source[:, :, start * size : stop * size].detach(), size)
            self._write("means", means, start, stop)
        elif "means" not in self._buffers:
            dtype = torch.promote_types(source.dtype, torch.float32)
            self._buffers["means"] = _room(source.to(dtype))
        self._buffers["means"] = _with_room(self._buffers["means"], stop, -(-now // size))

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; before transformers 5.18 a positive number is
        how many are left."""
        if not self.is_initialized or tokens_to_remove == 0:
            return
        left = self._length + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove
        self._length = max(0, min(self._length, left))
        self._show()

    def reset(self) -> None:
        self._buffers, self._length = {}, 0
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_rows(lambda x: x[indices])

    def offload(self) -> None:
        self._change_buffers(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change_buffers(lambda x: x.to(self.device, non_blocking=True))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._length:
            self._change_buffers(change)

    def _change_buffers(self, change: Callable[[Tensor], Tensor]) -> None:
        self._buffers = {name: change(buffer) for name, buffer in self._buffers.items()}
        if self.is_initialized:
            self._show()

    def _show(self) -> None:
        """`keys` and `values` as others know them, and on the keys what is kept beside them."""
        self.keys, self.values = (
            self._buffers[name][:, :, : self._length] for name in ("keys", "values")
        )
        if "means" in self._buffers:
            blocks = -(-self._length // self._block_size)
            screen = self._buffers.get("screen")
            kept = None if screen is None else screen[:, :, : self._length]
            means = self._buffers["means"][:, :, :blocks]
            setattr(self.keys, KEPT, KeptScreening(kept, means, self._block_size))


def _own_modules(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a LeanFormer that choose their keys."""
    return [m for m in model.modules() if hasattr(m, "attention_policy") and "budget" in vars(m)]


def budget_of(module: Any) -> Any:
    """Of a sparse attention module: a host's, or a LeanFormer's."""
    own = vars(module).get("sparse_settings")
    return module.budget if own is None else own.budget


def _room(states: Tensor) -> Tensor:
    """An empty buffer for tensors like `states`."""
    return states.new_empty(*states.shape[:2], 0, states.shape[3])


def _with_room(buffer: Tensor, length: int, wanted: int) -> Tensor:
    """`buffer` with its first `length` tokens, and room for `wanted`."""
    # Written to in inference mode alone, where another mode could not.
    frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
    if wanted <= buffer.shape[2] and not frozen:
        return buffer
    size = max(wanted, min(int(buffer.shape[2] * _GROWTH), 2 * wanted))
    size = -(-size // _STEP) * _STEP
    grown = buffer.new_empty(*buffer.shape[:2], size, buffer.shape[3])
    grown[:, :, :length] = buffer[:, :, :length]
    return grown


def _bytes_of(layer: Any) -> dict[str, int]:
    kept: dict[str, Any] = {name: getattr(layer, name, None) for name in ("keys", "values")}
    if isinstance(layer, GrowingLayer):
        kept = dict(layer._buffers)
    sizes = {n: x.untyped_storage().nbytes() for n, x in kept.items() if isinstance(x, Tensor)}
    pairs = sizes.pop("keys", 0) + sizes.pop("values", 0)
    return {"keys_values": pairs, "screening": sum(sizes.values())}
